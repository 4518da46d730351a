"What a page shows can be pasted into a script in an empty folder, and runs"

import os, re, subprocess, sys
from importlib import import_module
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

from docs.pages import NBS, example_imports, page_name

OF_THE_REPOSITORY = {'which_mode', 'put_to_the_test'}  # they show its tables, and say so
PAGES = sorted(NBS.rglob('*.ipynb'))


def shown_code(notebook):
    "The code that a reader of the page sees, without slow cells"
    nb = read_nb(notebook)
    cells = [c for c in nb.cells if c.cell_type == 'code']
    directives = [set(re.findall(r'^#\|\s*(\w+)', c.source, flags=re.M)) for c in cells]
    unseen = {'hide', 'export', 'exporti', 'default_exp', 'slow', 'echo'}
    shown = [c.source for c, words in zip(cells, directives) if not words & unseen]
    if any('default_exp' in words for words in directives):
        shown.insert(0, example_imports(nb, import_module(f'bnfreeze_fastai.{page_name(notebook).stem}')))
    return '\n\n'.join(shown)


@pytest.mark.parametrize('notebook', PAGES, ids=lambda p: p.stem)
def test_shown_code_runs_in_an_empty_folder(notebook, tmp_path):
    (tmp_path / 'page.py').write_text(shown_code(notebook), encoding='utf-8')
    folder = notebook.parent if notebook.stem in OF_THE_REPOSITORY else tmp_path
    env = os.environ | {'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1'}
    result = subprocess.run([sys.executable, tmp_path / 'page.py'], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
