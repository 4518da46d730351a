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
    "Where a notebook's page is, below the site's root: `nbs/07b_find.ipynb` is `find.md`"
    path = Path(notebook).relative_to(NBS)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.md')


def module_of(notebook):
    "The module that nbdev exports a notebook to"
    return import_module(f'{LIB}.{page_name(notebook).stem}')
