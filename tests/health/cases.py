"Learners whose gap has a known cause, trained for a few seconds on made data"

import copy
from functools import cache

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.basics import noop
from torch import nn

from bnfreeze_fastai.layers import bn_layers

SHAPE = (3, 8, 8)


def samples(n, classes=4, noise=1.0, seed=0, task=0):
    "Images of a class each: a pattern of its own in noise"
    patterns = torch.randn(classes, *SHAPE, generator=torch.Generator().manual_seed(task))
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return patterns[y] + noise * torch.randn(n, *SHAPE, generator=g), y


def net(classes=4, width=8, norm=nn.BatchNorm2d, momentum=0.1):
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), norm(o, momentum=momentum), nn.ReLU()]
    return nn.Sequential(
        *block(3, width), *block(width, width), *block(width, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


def loaders(train, valid=None, bs=32):
    dl = lambda xy, **kwargs: DataLoader(list(zip(*xy)), bs=bs, num_workers=0, **kwargs)
    return DataLoaders(dl(train, shuffle=True, drop_last=True), *([] if valid is None else [dl(valid)]), device='cpu')


def learner(train, valid=None, model=None, bs=32, **kwargs):
    set_seed(0)
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'opt_func': SGD, 'lr': 0.1, **kwargs}
    learn = Learner(loaders(train, valid, bs), net() if model is None else model, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn


def healthy():
    learn = learner(samples(512), samples(512, seed=1))
    learn.fit(4)
    return learn


def low_momentum():
    set_seed(0)
    learn = learner(samples(512), samples(512, seed=1), net(momentum=0.001))
    learn.fit(4)
    return learn


def averaged_weights():
    "The mean of the weights of two runs, as an average over training has it, with the statistics of the last"
    learn = learner(samples(512), samples(512, seed=1))
    learn.fit(2)
    average = copy.deepcopy(list(learn.model.parameters()))
    learn.fit(6, lr=0.3)
    with torch.no_grad():
        for p, old in zip(learn.model.parameters(), average):
            p.lerp_(old, 0.5)
    return learn


def normalised_otherwise():
    x, y = samples(512, seed=1)
    learn = learner(samples(512), (x * 2 + 1, y))
    learn.fit(4)
    return learn


def overfitted():
    x, y = samples(64, noise=3)
    learn = learner((x, y), samples(512, noise=3, seed=1), net(width=32))
    learn.fit(40)
    return learn


CASES = dict(
    healthy=healthy,
    low_momentum=low_momentum,
    averaged_weights=averaged_weights,
    normalised_otherwise=normalised_otherwise,
    overfitted=overfitted,
)


@cache
def _trained(case):
    return CASES[case]()


def trained(case):
    "A Learner of its own"
    return copy.deepcopy(_trained(case))
