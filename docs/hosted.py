"The cells of a tutorial for whoever opens it on Colab or Kaggle: links that do so, and what installs this package there"

import json

from nbdev.config import get_config

from docs.notebooks import REPOSITORY

# They show tables of the repository: to be read, not to be run elsewhere
NEED_A_CLONE = {'which_mode', 'put_to_the_test', 'costs_and_limits'}
UNKNOWN = '<address of this repository>'  # as the README has it, until pyproject.toml has `Repository` in `[project.urls]`


def links(notebook, address):
    "Where a notebook opens on Colab and Kaggle, which take notebooks from GitHub; empty if it is not there"
    owner_and_name = address.removeprefix('https://github.com/')
    if owner_and_name == address:
        return ''
    path = f'blob/main/nbs/tutorials/{notebook.name}'
    colab = f'https://colab.research.google.com/github/{owner_and_name}/{path}'
    return f'[Open in Colab]({colab}) · [Open in Kaggle](https://kaggle.com/kernels/welcome?src={address}/{path})'


def install(address):
    "Installs this package where a hosted notebook runs and nowhere else; a constraint for each package there keeps its version"
    return f'''#| hide
#| eval: false
# On Colab and Kaggle, install this package and leave all others as they are. Kaggle: first switch on Internet in the settings
! [ -e /content ] || [ -e /kaggle ] && pip list --format freeze > are_here.txt
! [ -e are_here.txt ] && pip install --quiet --constraint are_here.txt "git+{address or UNKNOWN}"'''


def hosted(notebook, address):
    "The cells of a notebook, with these two after its title"
    cells = [c for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if not c['id'].startswith('hosted-')]
    kept = dict(metadata={}, source=install(address).splitlines(keepends=True))
    new = [dict(cell_type='code', execution_count=None, id='hosted-install', outputs=[], **kept)]
    if line := links(notebook, address):
        new.insert(0, dict(cell_type='markdown', id='hosted-links', metadata={}, source=[line]))
    return [*cells[:1], *(new if notebook.stem not in NEED_A_CLONE else []), *cells[1:]]


def write_hosted(nbs, address=None):
    "Give each tutorial in the folder `nbs` its two cells; the address is that of pyproject.toml unless given"
    address = get_config(REPOSITORY).git_url if address is None else address
    for notebook in sorted((nbs / 'tutorials').glob('*.ipynb')):
        nb = json.loads(notebook.read_text(encoding='utf-8')) | dict(cells=hosted(notebook, address))
        notebook.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8', newline='\n')
