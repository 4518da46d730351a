"Two processes with gloo, of which each runs half of the samples"

import os, subprocess, sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes():
    script = Path(__file__).parent / 'shared_work_script.py'
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    res = subprocess.run(cmd, capture_output=True, text=True, timeout=540, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert res.returncode == 0 and 'all ranks agree' in res.stdout, res.stderr[-4000:]
