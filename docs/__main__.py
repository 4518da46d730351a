"Writes the README (`python -m docs readme`) or the pages of the site (`python -m docs pages`), which mkdocs makes a site of"

import shutil
from pathlib import Path

from fastcore.script import call_parse

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
    what: str,  # 'readme' or 'pages'
    to: Path,  # Folder for the README, or for the folder `_proc` with the pages, which is made anew
):
    "Make Markdown of the notebooks"
    if what == 'readme':
        (to / 'README.md').write_text(markdown(NBS / 'index.ipynb')[0], encoding='utf-8')
    elif what == 'pages':
        write_pages(to / '_proc')
    else:
        raise ValueError(f"{what!r} cannot be made: 'readme' or 'pages'")
