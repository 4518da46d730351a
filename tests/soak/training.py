"""The Learners that are killed and hurt: small, alike for one seed, and what a policy lets move in them"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from fastai.torch_core import params
from fastcore.basics import noop
from torch import nn

from bnfreeze_fastai.layers import MODES
from bnfreeze_fastai.layers import affine_params, norm_layers, stats_buffers
from bnfreeze_fastai.utils.restore import reseed

OPTIMIZERS = dict(adam=Adam, sgd=partial(SGD, mom=0.9), ranger=ranger, adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
N_TRAIN, N_VALID, BS = 32, 16, 8


class Case(NamedTuple):
    "What decides a Learner"

    seed: int
    n: int  # freeze point
    bn: str
    bn_above: str
    opt: str


def draw(rng, precomputes=False):
    "A random case; one whose frozen part can be run on its own if it `precomputes`"
    modes = list(MODES)
    n, bn = (rng.randint(1, 2), 'frozen') if precomputes else (rng.randint(0, 2), rng.choice(modes))
    return Case(rng.randrange(2**31), n, bn, rng.choice(modes), rng.choice(list(OPTIMIZERS)))


class Items:
    "Random images of two classes; `on_read` is called with the index of each that is read, and may raise"

    def __init__(self, n, seed, on_read=noop):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y, self.on_read = torch.randn(n, 3, 8, 8, generator=g), torch.arange(n) % 2, on_read

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.on_read(i)
        return self.x[i], self.y[i]


def pretend_pretrained(model):
    "Statistics and affine parameters as after some training"
    with torch.no_grad():
        for l in norm_layers(model).values():
            for t in (l.running_mean, l.bias):
                t.normal_(0, 0.3)
            for t in (l.running_var, l.weight):
                t.uniform_(0.5, 1.5)
            l.num_batches_tracked.fill_(1)


def new_model(ballast=0):
    "Body in two groups, and head; with `ballast`, as many numbers more to save"
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = nn.Sequential(body, head)
    pretend_pretrained(model)
    if ballast:
        model[0].register_buffer('ballast', torch.arange(ballast, dtype=torch.float32))
    return model


def in_groups(model):
    return [model[0][:3], model[0][3:], model[1]]


def splitter(model):
    return [params(m) for m in in_groups(model)]


def new_learner(case, seed=None, on_read=noop, num_workers=0, ballast=0, **kwargs):
    "A Learner as fastai makes it, without a policy"
    reseed(case.seed if seed is None else seed)
    items = [Items(n, case.seed + i, on_read) for i, n in enumerate((N_TRAIN, N_VALID))]
    loaders = [TfmdDL(d, bs=BS, shuffle=i == 0, num_workers=num_workers) for i, d in enumerate(items)]
    kwargs = {'loss_func': CrossEntropyLossFlat(), 'opt_func': OPTIMIZERS[case.opt], 'wd': 0.1, 'lr': 1e-2, **kwargs}
    learn = Learner(DataLoaders(*loaders, device='cpu'), new_model(ballast), splitter=splitter, path=Path('.'), **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn


def under_policy(learn, case):
    return learn.freeze_to_bn(case.n, bn=case.bn, bn_above=case.bn_above)


def parts(model):
    "A copy of all tensors, by group and half; found without the package's callback"
    found = {'ballast': [b for n, b in model[0].named_buffers() if n == 'ballast']}
    for i, m in enumerate(in_groups(model)):
        layers = norm_layers(m).values()
        found[f'stats of group {i}'] = [b for l in layers for b in stats_buffers(l).values()]
        found[f'affine of group {i}'] = affine = [p for l in layers for p in affine_params(l)]
        found[f'weights of group {i}'] = [p for p in m.parameters() if not any(p is a for a in affine)]
    return {k: [t.detach().clone() for t in v] for k, v in found.items()}


def may_move(case):
    "Which parts the policy lets move"
    res = set()
    for i in range(3):
        stats, affine = MODES[case.bn if i < case.n else case.bn_above]
        moving = dict(stats=stats, affine=affine, weights=i >= case.n)
        res |= {f'{half} of group {i}' for half, moves in moving.items() if moves}
    return res


def bitwise(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))  # NaN equals itself


def wrong_moves(before, model, case, all_move=False):
    "What moved since `before` though it is fixed and, with `all_move`, what did not though it trains; in words"
    now, free = parts(model), may_move(case)
    moved = {k for k in now if not all(map(bitwise, before[k], now[k]))}
    wrong = [f'{k} moved' for k in sorted(moved - free)]
    return wrong + [f'{k} did not train' for k in sorted(free - moved) if all_move]
