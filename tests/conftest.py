"Small models and Learners that the tests share"

import subprocess, sys
from functools import partial
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from torch import nn

import bnfreeze_fastai.all
from bnfreeze_fastai.all import *

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


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


OPTIMIZERS = dict(adam=Adam, sgd=partial(SGD, mom=0.9), ranger=ranger, torch_adamw=partial(OptimWrapper, opt=torch.optim.AdamW))


def body_and_head(norm=nn.BatchNorm2d):
    body = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), norm(4), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def two_groups(m):
    return [params(m[0]), params(m[1])]


def image(i, size):
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(i))


def label(i):
    return torch.tensor(i % 2)


def make_dls(n=24, bs=8, size=8):
    dsets = Datasets(range(n), [[partial(image, size=size)], [label]], splits=[range(n), range(bs)])
    return dsets.dataloaders(bs=bs, num_workers=0, device='cpu')


def make_learner(model=None, splitter=two_groups, size=8, **kwargs):
    set_seed(0)
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'wd': 0.1, 'lr': 0.1, **kwargs}
    learn = Learner(make_dls(size=size), body_and_head() if model is None else model, splitter=splitter, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def same(before, tensors):
    return all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


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


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
