"The grid: cells, policies, and one cell's runs"

import os, platform, warnings
from itertools import product
from pathlib import Path
from math import ceil

import torch
from bnfreeze_fastai.callback import BatchNormFreeze
from bnfreeze_fastai.compare import bn_compare
from bnfreeze_fastai.digits import ValidateLast
from bnfreeze_fastai.policy import Policy
from bnfreeze_fastai.restore import reseed
from bnfreeze_fastai.runs import put_policy
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import ValueMetric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params

from .images import read_images, split
from .networks import make_network

EPOCHS = {32: 20, 128: 10, 512: 5}
RATES = {'head': 1e-3, 'fine_tune': 2e-3, 'full': 1e-3}  # fastai's defaults
FIT = {'head': ('fit_one_cycle', -1), 'fine_tune': ('fine_tune', -1), 'full': ('fit_one_cycle', 0)}


class Peek(Callback):
    "Loss and accuracy on some validation images at a tenth and a quarter of the run: what a trial stopped there would see"
    order = 65  # after the schedule's callbacks

    def __init__(self, total):
        self.at = {ceil(f * total): k for k, f in (('10', 0.1), ('25', 0.25))}
        self.done, self.seen, self.losses = 0, {}, []

    def metrics(self):
        return [ValueMetric(lambda k=k: self.seen.get(k), f'peek_{k}') for k in ('loss10', 'acc10', 'loss25', 'acc25', 'train10', 'train25')]

    def after_batch(self):
        if not self.training:
            return
        self.losses.append(self.learn.loss.detach())
        self.done += 1
        if (k := self.at.get(self.done)) is None:
            return
        model, (x, y) = self.learn.model, self.learn.peek_batch
        model.eval()
        with torch.no_grad():
            out = torch.cat([model(part) for part in x.split(64)])
        model.train()
        self.seen[f'loss{k}'] = torch.nn.functional.cross_entropy(out, y).item()
        self.seen[f'acc{k}'] = (out.argmax(1) == y).float().mean().item()
        self.seen[f'train{k}'] = torch.stack(self.losses[-max(2, self.done // 3):]).mean().item()


def get_learner(seed, network, data, size, n_images, bs, trains, device, file=None):
    "A Learner on `n_images` images that `seed` draws, with a head that it draws too"
    torch.set_num_threads(1)
    images = read_images(data, size)
    train, valid = split(images, n_images, seed)
    n_classes = int(images.y.max()) + 1
    make_network(network, n_classes, file)  # reads the weights, which draws random numbers
    reseed(seed)
    model, (mean, std) = make_network(network, n_classes, file)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    dset = lambda part: [((images.x[i] / 255 - mean) / std, images.y[i]) for i in part]
    train, valid = dset(train), dset(valid)
    loaders = [TfmdDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0), TfmdDL(valid, bs=125, num_workers=0)]
    dls = DataLoaders(*loaders, device=torch.device(device))
    total = len(loaders[0]) * (EPOCHS[n_images] + (trains == 'fine_tune'))
    peek = Peek(total)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=[accuracy, *peek.metrics()],
                    splitter=lambda m: [params(m[0]), params(m[1])], cbs=[ValidateLast(), peek, BatchNormFreeze(verify=False)])  # fmt: skip
    at = torch.randperm(len(valid), generator=torch.Generator().manual_seed(seed))[:250]
    learn.peek_batch = torch.stack([valid[i][0] for i in at]).to(device), torch.stack([valid[i][1] for i in at]).to(device)
    learn.all_train = torch.stack([x for x, _ in train]), torch.stack([y for _, y in train])
    learn.all_valid = torch.stack([x for x, _ in valid]), torch.stack([y for _, y in valid])
    return learn


def _all_at_once(learn):
    return [tuple(t.to(learn.dls.device) for t in learn.all_train)]


def _throughout(learn, mode, n):
    learn.add_cb(BatchNormFreeze(verify=False))
    put_policy(learn, mode, n)


def converted(learn):
    learn.recalibrate_bn(layers='0.*', method='sequential', preserve=True)


def converted_affine_only(learn):
    n = learn.opt.frozen_idx
    converted(learn)
    _throughout(learn, 'affine-only', n)


def means(learn):
    n = learn.opt.frozen_idx
    learn.recalibrate_bn(dl=_all_at_once(learn), layers='0.*', stats='mean')
    _throughout(learn, 'affine-only', n)


def first(learn):
    n = learn.opt.frozen_idx
    name = next(n for n, l in learn.model.named_modules() if isinstance(l, torch.nn.BatchNorm2d))
    learn.recalibrate_bn(dl=_all_at_once(learn), layers=name)
    _throughout(learn, 'affine-only', n)


def fixed_at_half(learn):
    learn.add_cb(BatchNormFreeze('train', 'train', verify=False, schedule={0.5: dict(bn='affine-only', bn_above={'0.*': 'affine-only', '*': 'train'})}))


def converted_fixed_at_half(learn):
    converted(learn)
    fixed_at_half(learn)


FIXED = {'stats-only': 'stats-only', 'affine-only': 'affine-only', 'frozen': 'frozen'}
CONVERTED = {'converted': converted, 'converted, affine-only': converted_affine_only}
POLICIES = {
    'head': {'fastai': 'fastai', **FIXED, **CONVERTED, 'means, affine-only': means, 'first, affine-only': first},
    'fine_tune': {'fastai': 'fastai', **FIXED, 'frozen, then train': Policy('frozen', 'train'), **CONVERTED},
    'full': {'fastai': 'fastai', **FIXED, **CONVERTED, 'fixed at half': fixed_at_half, 'converted, fixed at half': converted_fixed_at_half},
}  # fmt: skip
