"How one cell of the grid is trained: its Learner, its fit, and its policies"

import torch
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params

from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.digits import ValidateLast
from bnfreeze_fastai.freeze.policy import Policy
from bnfreeze_fastai.utils.restore import reseed
from bnfreeze_fastai.choose.policies import put_policy

from .images import read_images, split
from .networks import in_thirds, make_network

KEYS = ['network', 'data', 'size', 'n_images', 'bs', 'trains', 'rate']  # of a cell
EPOCHS = {32: 20, 128: 10, 512: 5}  # by training images
FITS = {  # method, freeze point, fastai's learning rate
    'head': ('fit_one_cycle', -1, 1e-3),
    'fine_tune': ('fine_tune', -1, 2e-3),
    'fine_tune in thirds': ('fine_tune', -1, 2e-3),
    'slice': ('fit_one_cycle', 0, 1e-3),
    'full': ('fit_one_cycle', 0, 1e-3),
}


def learning_rate(trains, rate):
    "`rate` times fastai's; for `slice`, a hundredth of that in the pretrained part, as `fine_tune` has it"
    lr = FITS[trains][2] * rate
    return slice(lr / 100, lr) if trains == 'slice' else lr


def get_learner(seed, network, data, size, n_images, bs, thirds=False, weights=None, device='cpu'):
    "A Learner on `n_images` images that `seed` draws, with a head that it draws too"
    torch.set_num_threads(1)  # so that the results do not depend on the machine's number of cores
    images = read_images(data, size)
    n_classes = int(images.y.max()) + 1
    make_network(network, n_classes, weights)  # reads the weights, which draws random numbers
    reseed(seed)
    model, (mean, std) = make_network(network, n_classes, weights)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (mean, std))
    train, valid = ([((images.x[i] / 255 - mean) / std, images.y[i]) for i in part] for part in split(images, n_images, seed))
    loaders = TfmdDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0), TfmdDL(valid, bs=125, num_workers=0)
    dls = DataLoaders(*loaders, device=torch.device(device))
    splitter = in_thirds(network) if thirds else lambda m: [params(m[0]), params(m[1])]
    cbs = [ValidateLast(), BatchNormFreeze(verify=False)]
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=splitter, cbs=cbs)


def _then_affine_only(learn, change):
    "`change` the statistics of the body, and hold them throughout with weight and bias training"
    n = learn.opt.frozen_idx
    change(learn)
    learn.add_cb(BatchNormFreeze(verify=False))
    put_policy(learn, 'affine-only', n)


def _batch(learn):
    "All training images as one batch: what it gives one layer after another is exact"
    return [tuple(torch.stack(part).to(learn.dls.device) for part in zip(*learn.dls.train.dataset))]


def _first(learn):
    name = next(n for n, layer in learn.model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d))
    learn.recalibrate_bn(dl=_batch(learn), layers=name)


def converted_affine_only(learn):
    _then_affine_only(learn, lambda learn: learn.recalibrate_bn(layers='0.*', method='sequential', preserve=True))


def means_affine_only(learn):
    _then_affine_only(learn, lambda learn: learn.recalibrate_bn(dl=_batch(learn), layers='0.*', stats='mean'))


def first_affine_only(learn):
    _then_affine_only(learn, _first)


def fixed_at_half(learn):
    half = {0.5: dict(bn='affine-only', bn_above={'0.*': 'affine-only', '*': 'train'})}
    learn.add_cb(BatchNormFreeze('train', 'train', verify=False, schedule=half))


def converted_fixed_at_half(learn):
    learn.recalibrate_bn(layers='0.*', method='sequential', preserve=True)
    fixed_at_half(learn)


POLICIES = {name: name for name in ('fastai', 'train', 'stats-only', 'affine-only', 'frozen', 'converted')} | {
    'frozen, then train': Policy('frozen', 'train'),
    'converted, affine-only': converted_affine_only,
    'means, affine-only': means_affine_only,
    'first, affine-only': first_affine_only,
    'fixed at half': fixed_at_half,
    'converted, fixed at half': converted_fixed_at_half,
}
