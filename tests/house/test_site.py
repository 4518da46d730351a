"The site in a real browser: Debian's Chromium, which `make test` installs where it may"

import functools, http.server, os, re, shutil, threading

import pytest
from conftest import make, METHODS, PUBLIC, ROOT

import bnfreeze_fastai.all as door

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install -e ".[dev]"')

pytestmark = [pytest.mark.xdist_group('site'), pytest.mark.browser]  # which is built once
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'
on_ci = 'CI' in os.environ  # there, to be without a browser is a failure
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not on_ci, reason='there is no Chromium: apt-get install chromium, or run `make test` as root'
)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The folder in which `make docs` has left the pages and the site"
    folder = tmp_path_factory.mktemp('docs')
    make('docs', folder)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def site(built):
    "The site's address, and its pages"
    handler = functools.partial(Quiet, directory=built / '_docs')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = [str(p.relative_to(built / '_docs')) for p in (built / '_docs').rglob('*.html') if p.name != '404.html']
    yield f'http://127.0.0.1:{server.server_port}', sorted(pages)
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(site, browser):
    "Opens a page of the site in a new window; what goes wrong there, and any request to elsewhere, fails the test"
    faults, contexts = [], []

    def open_page(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on('console', lambda message: faults.append(f'{page.url}: {message.text}') if message.type in ('error', 'warning') else None)
        page.on('pageerror', lambda error: faults.append(f'{page.url}: {error}'))
        page.on(
            'response', lambda response: faults.append(f'{page.url}: {response.status} {response.url}') if response.status >= 400 else None
        )
        page.on('request', lambda request: faults.append(f'{page.url} asks {request.url}') if not request.url.startswith(site[0]) else None)
        page.goto(f'{site[0]}/{path}')
        page.wait_for_load_state('networkidle')
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


PROSE = """() => {
    const article = document.querySelector('article').cloneNode(true)
    article.querySelectorAll('code, pre, .katex').forEach(e => e.remove())
    return article.textContent
}"""


def assert_whole(page, path):
    assert page.locator('h1').count() == 1 and page.locator('h1').is_visible(), path
    for image in page.locator('article img').all():
        image.scroll_into_view_if_needed()
        assert image.evaluate('i => i.complete && i.naturalWidth > 0') and image.is_visible(), path
    assert page.locator('.arithmatex').count() == page.locator('.arithmatex .katex').count(), path
    prose = page.evaluate(PROSE)
    assert '$' not in prose and '\n- ' not in prose and '**' not in prose, path
    assert page.evaluate('document.scrollingElement.scrollWidth <= window.innerWidth'), f'{path} is wider than the window'


@needs_browser
@pytest.mark.parametrize('size', [pytest.param((1280, 900), id='desk'), pytest.param((390, 844), id='phone', marks=pytest.mark.long)])
def test_every_page_is_whole(visit, site, size):
    pages = site[1]
    assert len(pages) == len(list((ROOT / 'nbs').rglob('*.ipynb')))
    page = visit(pages[0], viewport=dict(width=size[0], height=size[1]))
    for path in pages:  # in one window, which has scripts and fonts already
        page.goto(f'{site[0]}/{path}')
        page.evaluate('document.fonts.ready.then(() => true)')
        assert_whole(page, path)


@needs_browser
def test_search_finds_freeze_to_bn_and_leads_to_it(visit):
    page = visit('index.html')
    page.get_by_placeholder('Search').click()
    page.get_by_text('Type to start searching').wait_for()  # the index is there
    page.keyboard.type('freeze_to_bn')
    result = page.locator('.md-search-result__link', has_text='Learner.freeze_to_bn').first
    result.click()
    heading = page.locator('[id="learner.freeze_to_bn"]')
    heading.wait_for()
    assert '/learner.html' in page.url and heading.is_visible()


@needs_browser
def test_formulas_are_drawn_with_their_fonts(visit):
    page = visit('stats/distances.html')
    formula = page.locator('.arithmatex .katex').first
    assert formula.is_visible() and formula.bounding_box()['width'] > 10
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].some(f => f.family == 'KaTeX_Math' && f.status == 'loaded'))")


@needs_browser
def test_code_is_highlighted_and_can_be_told_from_text(visit):
    page = visit('index.html')
    colour = "e => getComputedStyle(e).color"
    keyword = page.locator('.highlight .kn').first
    assert keyword.inner_text() == 'from'
    assert keyword.evaluate(colour) != page.locator('.highlight .n').first.evaluate(colour)


@needs_browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_dark_and_light(visit, scheme):
    page = visit('index.html', color_scheme=scheme)
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    first = page.evaluate(brightness)
    assert (first > 384) == (scheme == 'light')
    page.locator('label[for^=__palette]:visible').click()
    assert (page.evaluate(brightness) > 384) != (scheme == 'light')


@needs_browser
def test_menu_on_a_phone(visit):
    page = visit('index.html', viewport=dict(width=390, height=844))
    page.locator('label.md-header__button[for=__drawer]').click()
    page.locator('.md-nav--primary label.md-nav__link', has_text='Tutorials').click()
    page.locator('.md-nav--primary').get_by_role('link', name='Small, colour-shifted data').click()
    page.wait_for_url('**/small_data.html')
    assert page.locator('h1').inner_text().startswith('Small, colour-shifted data')


@needs_browser
def test_reference_has_signature_parameters_and_source(visit):
    page = visit('learner.html')
    start = page.locator('[id="learner.freeze_to_bn"]')
    following = start.locator('xpath=following-sibling::*')
    assert following.nth(0).inner_text().startswith('def freeze_to_bn(')
    table = following.locator('table').first
    assert table.locator('td').first.inner_text() == 'n' and 'Freeze point' in table.inner_text()
    source = start.locator('xpath=following-sibling::details').first
    assert not source.locator('code').is_visible()
    source.locator('summary').click()
    assert 'cb.freeze_to(n)' in source.locator('code').inner_text()


def test_everything_public_has_its_place(built):
    site = built / '_docs'
    text = {'.'.join(p.relative_to(site).with_suffix('').parts): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    assert len(PUBLIC) > 20 and len(METHODS) > 10
    for name in PUBLIC:
        page = text[getattr(door, name).__module__.partition('.')[2]]
        assert f'id="{name.lower()}"' in page, name
    everything = ''.join(text.values())
    assert [m for m in METHODS if f'id="learner.{m.lower()}"' not in everything] == []
    assert 'ValueError' in text['learner'].partition('id="learner.fuse_bn"')[2].partition('<details')[0]  # said of what is returned
    homes = {
        'ModeSpec': 'freeze.policy',
        'Schedule': 'freeze.stages',
        'Snapshot': 'stats.distances',
        'Policies': 'choose.policies',
        'Fit': 'choose.runs',
    }
    for alias, module in homes.items():
        assert f'<span class="n">{alias}</span> <span class="o">=' in text[module], alias


FAULTS = dict(
    page='[x](nowhere.md)',
    anchor='[x](stats/distances.md#nowhere)',
    own='[x](#nowhere)',
    picture='![x](nowhere.png)',
    absolute='[x](/stats/distances.md)',
)


@pytest.fixture(scope='module')
def refused(built, tmp_path_factory):
    "What `make site` says when it refuses pages with each of these faults and one page more"
    folder = tmp_path_factory.mktemp('faults')
    shutil.copytree(built / '_proc', folder / '_proc')
    with open(folder / '_proc' / 'index.md', 'a', encoding='utf-8') as file:
        file.write('\n\n' + '\n\n'.join(FAULTS.values()) + '\n')
    (folder / '_proc' / 'new.md').write_text('# New\n')
    return make('site', folder, succeeds=False)


@pytest.mark.parametrize('fault', FAULTS.values(), ids=FAULTS)
def test_a_broken_link_fails_the_build(refused, fault):
    link = re.search(r'\((.*)\)', fault)[1]
    assert re.search(rf"WARNING -  Doc file 'index.md' contains an? (absolute )?link '{re.escape(link)}'", refused)


def test_a_page_outside_the_menu_fails_the_build(refused):
    assert re.search(r'WARNING -  .* not included in the "nav" configuration:\n  - new.md\n', refused)


def test_each_warning_fails_the_build(refused):
    assert f'Aborted with {len(FAULTS) + 1} warnings in strict mode' in refused
