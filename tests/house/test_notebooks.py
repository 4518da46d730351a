"Each notebook runs, without its slow cells, as `nbdev-test` runs it"

import os, sys
from pathlib import Path

import pytest, warm
from conftest import ROOT

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


# What trains for ten seconds or more
LONG = 'recipes 15_recalibrate step_by_step which_mode head_training image_folder small_data what_batch_norm_does'.split()
NOTEBOOKS = [pytest.param(p, id=p.stem, marks=[pytest.mark.long] * (p.stem in LONG)) for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))]


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook_runs(notebook):
    result = warm.run(
        BIN / 'nbdev-test',
        notebook,
        folder=ROOT,
        also=('nbdev.test', 'fastai.vision.all'),
        PATH=os.pathsep.join([str(BIN), os.environ['PATH']]),
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
