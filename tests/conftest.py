"What the tests share"

import os, re, subprocess, sys
from pathlib import Path

import pytest, torch, warm
from fastai.learner import Learner
from fastai.torch_core import default_device
from learners import bits, same

import bnfreeze_fastai.all
from bnfreeze_fastai.fusion import lazy
from bnfreeze_fastai.layers import MODES, norm_layers, stats_buffers

torch.set_num_threads(1)
if sys.platform == 'darwin' and 'CI' in os.environ:
    default_device(False)  # the GPU of a hosted runner has no memory

on_linux = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc, or sends signals that other systems lack')

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption('--device', help='where the tests in tests/gpu run, such as cpu; on a GPU if there is one')


def ours(o):
    return getattr(o, '__module__', '').startswith('bnfreeze_fastai')


PUBLIC = {n for n, o in vars(bnfreeze_fastai.all).items() if ours(o)}  # functions and classes that `all` offers
METHODS = {n for n, o in vars(Learner).items() if ours(o)}  # of this package, added to every Learner


def make(target, out, folder=ROOT, succeeds=True):
    "What `make target OUT=out` says, in the environment of the tests, which is neither made nor changed by it"
    bin = Path(sys.executable).parent
    command = ['make', '--silent', '--old-file', '.venv/installed', target, f'BIN={bin}', f'OUT={out}']
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert (result.returncode == 0) == succeeds, said
    return said


def loads_without_this_package(path):
    "Whether an exported Learner can be loaded by a process that has fastai and not this package"
    result = warm.run(ROOT / 'tests' / 'load_script.py', path)
    assert result.returncode == 0 or re.search('ModuleNotFoundError: .*bnfreeze_fastai', result.stderr), result.stderr
    return result.returncode == 0


def assert_two_ranks_agree(script):
    "Run `script` on two processes with gloo; it says so at its end"
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0 and 'all ranks agree' in result.stdout, result.stderr[-4000:]


class Body:
    "The tensors of a model's body by half, and what moved of them since"

    def __init__(self, body):
        self.body, self.before = body, {k: bits(v) for k, v in self.parts(body).items()}

    @staticmethod
    def parts(body):
        norms = norm_layers(body).values()
        affine = [p for l in norms for p in l.parameters(recurse=False)]
        return dict(
            stats=[b for l in norms for b in stats_buffers(l).values()],
            affine=affine,
            others=[p for p in body.parameters() if not any(p is a for a in affine)],
        )

    def moved(self, body=None):
        return {k for k, v in self.parts(body or self.body).items() if not same(self.before[k], v)}


def may_move(mode):
    return {half for half, moves in zip(('stats', 'affine'), MODES[mode]) if moves}


@pytest.fixture
def fused_at_any_size(monkeypatch):
    "Layers too small for fusion to pay are fused as well"
    monkeypatch.setattr(lazy, 'pays', lambda *_: True)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='session')
def device(pytestconfig):
    return pytestconfig.getoption('device') or ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture
def gpu(device):
    "The device, where only a GPU will do"
    if torch.device(device).type != 'cuda':
        pytest.skip('needs a GPU')
    return device
