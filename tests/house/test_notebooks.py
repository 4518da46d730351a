"Each notebook runs, without its slow cells, as `nbdev-test` runs it"

import os, sys
from pathlib import Path

import pytest, warm
from conftest import ROOT

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


@pytest.mark.parametrize('notebook', sorted((ROOT / 'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook_runs(notebook):
    result = warm.run(BIN / 'nbdev-test', notebook, folder=ROOT, PATH=os.pathsep.join([str(BIN), os.environ['PATH']]))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
