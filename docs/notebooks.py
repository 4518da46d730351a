"Where notebooks, their modules and their pages are"

import re
from importlib import import_module
from pathlib import Path

from nbdev.config import get_config

NBS = Path(__file__).resolve().parent.parent / 'nbs'


def page_name(notebook):
    "Where a notebook's page is, below the site's root: `nbs/07b_find.ipynb` is `find.md`"
    path = Path(notebook).relative_to(NBS)
    return path.with_name(re.sub(r'^\d+[a-z]?_', '', path.stem) + '.md')


def module_of(notebook):
    "The module that nbdev exports a notebook to"
    return import_module(f'{get_config().lib_name}.{page_name(notebook).stem}')
