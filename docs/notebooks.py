"Where notebooks, their modules and their pages are"

import re
from importlib import import_module
from pathlib import Path

from fastcore.xtras import working_directory
from nbdev.config import get_config

REPOSITORY = Path(__file__).resolve().parent.parent
NBS = REPOSITORY / 'nbs'
LIB = get_config(REPOSITORY).lib_name
in_repository = working_directory(REPOSITORY)  # around what asks nbdev, which reads its settings from the current folder


def page_name(notebook):
    "Where a notebook's page is, below the site's root: `nbs/choose/08_find.ipynb` is `choose/find.md`"
    path = Path(notebook).relative_to(NBS)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.md')


def module_of(notebook):
    "The module that nbdev exports a notebook to"
    return import_module('.'.join([LIB, *page_name(notebook).with_suffix('').parts]))


def rooms():
    "The folders and modules of the package, from the ground up, as CONTRIBUTING.md has them"
    table = (REPOSITORY / 'CONTRIBUTING.md').read_text(encoding='utf-8').partition('| room |')[2].partition('\n\n')[0]
    return [room for room in re.findall(r'^\| `(\w+)/?`', table, flags=re.M) if room != 'tutorials']


def notebooks_of(room):
    "The notebooks of a room, in order: those of a folder, or the one of a module"
    found = sorted((NBS / room).glob('*.ipynb')) if (NBS / room).is_dir() else []
    return found or [path for path in NBS.glob('*.ipynb') if page_name(path).stem == room]
