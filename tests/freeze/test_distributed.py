"Two processes with gloo: through PyTorch's own wrapper, and through fastai's `distrib_ctx`"

import os, subprocess, sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


@pytest.mark.guarantee(3)
@pytest.mark.parametrize('script', ['distributed_script.py', 'distrib_ctx_script.py'])
def test_two_processes(script):
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(Path(__file__).parent / script)]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=540, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert res.returncode == 0 and 'all ranks agree' in res.stdout, res.stderr[-4000:]
