"Writes the README (`python -m docs readme .`), the pages that mkdocs makes a site of (`pages`), or what tutorials need elsewhere (`hosted`)"

import shutil
from pathlib import Path

from fastcore.script import call_parse

from docs.hosted import write_hosted
from docs.links import site_links
from docs.notebooks import NBS, page_name
from docs.pages import markdown


def write_pages(to):
    "All notebooks as Markdown in the folder `to`, which is made anew"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(NBS.parent / 'docs' / 'assets', to / 'assets')
    shutil.copy(NBS / 'llms.txt', to)
    for notebook in sorted(NBS.rglob('*.ipynb')):
        page = to / page_name(notebook)
        text, pictures = markdown(notebook)
        page.parent.mkdir(exist_ok=True)
        page.write_text(site_links(text, notebook), encoding='utf-8')
        for path, content in pictures.items():
            (page.parent / path).parent.mkdir(exist_ok=True)
            (page.parent / path).write_bytes(content)


@call_parse
def main(
    what: str,  # 'readme', 'pages' or 'hosted'
    to: Path,  # Folder for the README, for the folder `_proc` with the pages, which is made anew, or of `nbs`
):
    "Make Markdown of the notebooks"
    if what == 'readme':
        (to / 'README.md').write_text(markdown(NBS / 'index.ipynb')[0], encoding='utf-8')
    elif what == 'pages':
        write_pages(to / '_proc')
    elif what == 'hosted':
        write_hosted(to / 'nbs')
    else:
        raise ValueError(f"{what!r} cannot be made: 'readme', 'pages' or 'hosted'")
