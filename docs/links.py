"Links that hold on the site"

import re
from os.path import relpath

import bnfreeze_fastai.all
from nbdev.doclinks import NbdevLookup

from docs.notebooks import NBS, in_repository, page_name

CODE_OR_HTML = re.compile(r'(^ {0,3}(?:```|~~~).*?^ {0,3}(?:```|~~~)$|^(?:    | *<).*?$)', flags=re.M | re.S)
LINK_OR_NAME = re.compile(r'\[[^]]*\]\([^)]*\)|`(?P<name>[\w.]+)(?:\([^`]*\))?`')
NOTEBOOK = re.compile(r'\]\((?P<path>[\w./]+\.ipynb)(?P<anchor>#[^)]*)?\)')


@in_repository
def reference_url(name, page):
    "Where a name of the package, a method of a Learner or a full name of another nbdev project is described, seen from a page"
    known = '.' in name or hasattr(bnfreeze_fastai.all, name)
    url = NbdevLookup().doc(re.sub(r'^learn\.', 'Learner.', name)) if known else None
    if not url or '://' in url:
        return url
    path, _, anchor = url.lstrip('/').partition('#')
    return f'{relpath(path, page.parent)}#{anchor}'.replace('.html', '.md')


def site_links(text, notebook):
    "Links to notebooks as links to pages, and names of what the package offers as links to their reference; all relative"
    page = page_name(notebook)

    def to_page(link):
        folder = NBS.parent if link['path'].startswith('nbs/') else notebook.parent
        target = page_name((folder / link['path']).resolve())
        return f']({relpath(target, page.parent)}{(link["anchor"] or "").lower()})'

    def to_reference(found):
        url = reference_url(found['name'], page) if found['name'] else None
        return f'[{found[0]}]({url})' if url else found[0]

    parts = CODE_OR_HTML.split(text)
    parts[::2] = [LINK_OR_NAME.sub(to_reference, NOTEBOOK.sub(to_page, prose)) for prose in parts[::2]]
    return ''.join(parts)
