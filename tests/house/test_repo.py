"The repository agrees with itself: modules and README with the notebooks, the notebooks with the house"

import ast, importlib, importlib.util, json, platform, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import distributions, metadata, requires, version
from pathlib import Path

import pandas as pd, pytest
from conftest import make, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from docs.notebooks import notebooks_of, page_name, rooms

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT / 'settings.ini', encoding='utf-8')
SETTINGS = CONFIG['DEFAULT']
PYTHONS = re.findall(r'Python :: (3\.\d+)', SETTINGS['classifiers'])
LOCK = [Requirement(line) for line in (ROOT / 'requirements-dev.txt').read_text(encoding='utf-8').splitlines() if line[0] not in '# ']


def text(folder, *patterns):
    return {p: p.read_text(encoding='utf-8') for pattern in patterns for p in folder.glob(pattern)}


@pytest.fixture
def copy(tmp_path):
    for name in ('nbs', 'bnfreeze_fastai'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'command,patterns', [('nbdev-export', ['bnfreeze_fastai/**/*.py', 'nbs/llms.txt']), ('nbdev-clean', ['nbs/**/*.ipynb'])]
)
def test_exported_and_clean(copy, command, patterns):
    before = text(copy, *patterns)
    subprocess.run([BIN / command], cwd=copy, check=True)
    assert text(copy, *patterns) == before, f'run {command}'


def test_readme_is_made_from_the_index(tmp_path):
    make('readme', tmp_path)
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == (ROOT / 'README.md').read_text(encoding='utf-8'), 'run make readme'


def test_metadata_comes_from_settings():
    cfg, dist = SETTINGS, metadata('bnfreeze_fastai')
    import bnfreeze_fastai

    assert version('bnfreeze_fastai') == bnfreeze_fastai.__version__
    assert dist['Name'] == cfg['lib_name'] and dist['Summary'] == cfg['description'] and dist['Requires-Python'] == f">={cfg['min_python']}"
    assert f"## {bnfreeze_fastai.__version__}" in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_users_get_the_bounds_and_not_the_lock():
    needed = [r for r in map(Requirement, requires('bnfreeze_fastai')) if r.marker is None]
    assert set(map(str, needed)) == {str(Requirement(bound)) for bound in SETTINGS['requirements'].split()}


def locked(python):
    "What the lock has for a Python: the one version of each package"
    environment = dict(python_version=python.rpartition('.')[0], python_full_version=python)
    here = [r for r in LOCK if r.marker is None or r.marker.evaluate(environment)]
    names = [canonicalize_name(r.name) for r in here]
    assert len(set(names)) == len(names) and all(re.fullmatch(r'==[^*,]+', str(r.specifier)) for r in here)
    return {name: str(r.specifier)[2:] for name, r in zip(names, here)}


@pytest.mark.parametrize('python', [f'{p}.{patch}' for p in PYTHONS for patch in (0, 99)])
def test_lock_keeps_every_bound(python):
    versions = locked(python)
    for bound in map(Requirement, (SETTINGS['requirements'] + ' ' + SETTINGS['dev_requirements']).split()):
        assert versions[canonicalize_name(bound.name)] in bound.specifier, f'{bound}: run make upgrade'


def test_environment_is_the_locked_one():
    versions = locked(platform.python_version())
    found = {canonicalize_name(d.name): d.version for d in distributions()}
    assert {name: found.get(name) for name in versions} == versions
    assert found.keys() - versions.keys() <= {'pip', 'bnfreeze-fastai'}


def test_lock_names_no_place():
    assert not re.search(r'://|--|@', (ROOT / 'requirements-dev.txt').read_text(encoding='utf-8'))


def imported(module):
    "The modules of the package that one of them imports, as dotted names without the package's"
    package = ['bnfreeze_fastai', *module.split('.')][:-1]
    for node in ast.walk(ast.parse((ROOT / 'bnfreeze_fastai' / f"{module.replace('.', '/')}.py").read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('bnfreeze_fastai')):
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])] if node.level else node.module.split('.')
            for alias in node.names:
                path = [*base[1:], alias.name]
                yield '.'.join(path if (ROOT / 'bnfreeze_fastai' / '/'.join(path)).with_suffix('.py').exists() else base[1:])
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[2] for alias in node.names if alias.name.startswith('bnfreeze_fastai.'))


FLOORS = ['.'.join(page_name(path).with_suffix('').parts) for room in rooms() for path in notebooks_of(room)]


@pytest.mark.parametrize('module', FLOORS)
def test_modules_import_downwards_only(module):
    assert set(imported(module)) - {'_moved'} <= set(FLOORS[: FLOORS.index(module)])


def test_every_module_has_a_room():
    package = ROOT / 'bnfreeze_fastai'
    modules = {'.'.join(p.relative_to(package).with_suffix('').parts) for p in package.rglob('*.py')}
    assert {m for m in modules if not m.endswith('__init__')} - {'_modidx', '_moved', 'all'} == set(FLOORS)


@pytest.mark.parametrize('module', FLOORS)
def test_modules_are_short(module):
    assert len((ROOT / 'bnfreeze_fastai' / f"{module.replace('.', '/')}.py").read_text(encoding='utf-8').splitlines()) <= 200


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_like_a_page(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert re.match(r'# .+\n\n> .+', ''.join(cells[0]['source'])), 'a title and a subtitle'
    assert sum(c['cell_type'] == 'markdown' for c in cells) > len(cells) / 5
    assert path.stem == 'index' or any('## Card' in ''.join(c['source']) for c in cells) or path.stem in ('04_plots', '08_cli')
    for c in cells:
        if c['cell_type'] == 'code':
            assert max(map(len, ''.join(c['source']).splitlines())) <= 140, ''.join(c['source'])


def test_bounds_are_what_was_seen_to_pass():
    bounds = dict(re.findall(r'(\S+?)>=([\d.]+)', SETTINGS['requirements']))
    rows = pd.read_csv(ROOT / 'tests' / 'versions' / 'table.csv', dtype=str).to_dict('records')
    oldest = next(row for row in rows if row['versions'] == 'oldest')
    told = oldest.keys() & bounds.keys()
    assert len(told) > 5 and all(Version(oldest[name]) == Version(bounds[name]) for name in told)
    pythons = {row['python'].rpartition('.')[0] for row in rows}
    assert pythons == set(PYTHONS) and SETTINGS['min_python'] in pythons
    assert f'fastai {bounds["fastai"]}' in (ROOT / 'README.md').read_text(encoding='utf-8')
    assert all(re.fullmatch(r'\d+ passed(, \d+ skipped)?', row['result']) for row in rows)


@pytest.mark.parametrize('command', ['format --check', 'check --select F --ignore F401,F403,F405'])
def test_scripts_are_formatted_and_name_what_exists(command):
    places = ['tests', 'docs', 'bench', 'noxfile.py']
    result = subprocess.run([BIN / 'ruff', *command.split(), '--no-cache', *places], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('folder', ['bench', 'bench/evidence', 'tests/soak', 'tests/sweep'])
def test_scripts_import_what_is_there(folder):
    for path in sorted((ROOT / folder).glob('[!t]*.py')):
        if 'script' not in path.stem:
            importlib.import_module(f"{folder.replace('/', '.')}.{path.stem}")
