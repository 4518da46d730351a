"Small models and Learners of fastai alone, so that what is exported of them can be loaded without this package"

from functools import partial

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import Datasets
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, ranger, SGD
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from torch import nn

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


def make_dls(n=24, bs=8, size=8, device='cpu'):
    dsets = Datasets(range(n), [[partial(image, size=size)], [label]], splits=[range(n), range(bs)])
    return dsets.dataloaders(bs=bs, num_workers=0, device=device)


def make_learner(model=None, splitter=two_groups, size=8, device='cpu', **kwargs):
    set_seed(0)
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'wd': 0.1, 'lr': 0.1, **kwargs}
    learn = Learner(make_dls(size=size, device=device), body_and_head() if model is None else model, splitter=splitter, **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn


def pretrained(**kwargs):
    "A Learner whose body has trained statistics and whose head has none"
    set_seed(0)
    make_learner(model=(model := body_and_head()), device=kwargs.get('device', 'cpu')).fit(1)
    model[1][2].reset_parameters()
    learn = make_learner(model=model, **kwargs)
    set_seed(0)
    return learn


def bits(tensors):
    return [t.detach().clone() for t in tensors]


def same(before, tensors):
    return all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
