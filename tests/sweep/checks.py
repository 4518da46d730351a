"What each network has to stand: what is fixed stays bitwise as it was, stored features give the same losses, fusion the same gradients"

import re
from contextlib import ExitStack
from functools import partial
from itertools import product
from numbers import Number
from unittest.mock import patch

import torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelTrainException, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.optimizer import SGD, Adam
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.layers import MODES
from bnfreeze_fastai.fusion.fuse import fused_bn
from bnfreeze_fastai.freeze.summary import BatchNormSummary
import bnfreeze_fastai.learner  # gives Learners their methods

from .networks import as_vision_learner, two_groups

NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)  # not `norm_layers`, which is among what is checked
STATS = ('running_mean', 'running_var', 'num_batches_tracked')
BATCH, LR, WD = 4, 1e-3, 0.1
SINGLE, DOUBLE = 1e-4, 1e-10  # tolerances, relative to the largest value of a tensor
OPTIMIZERS = {'SGD': partial(SGD, mom=0.9), 'Adam': Adam}
STEPS = {  # mode on both sides and freeze point of one step after the other; what was trained has running averages when it is frozen
    'SGD': list(product(MODES, (0, -1))),
    'Adam': [('train', 0), ('frozen', -1), ('affine-only', -1)],
}
OF_LARGE = {'SGD': [(mode, -1) for mode in MODES]}  # every pass over their weights takes seconds
LARGE = 40e6  # parameters


# --- what the checks share


def tensors_of(out):
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def loss(out, y):
    "Cross entropy of every output, be they in a dict or of auxiliary heads; maps are averaged"
    return sum(F.cross_entropy(t.flatten(2).mean(2) if t.ndim > 2 else t, y) for t in tensors_of(out))


def learner(model, pixels, opt_func=OPTIMIZERS['SGD'], splitter=two_groups, bs=BATCH, **kwargs):
    "Two batches of random images to train on, and one to validate with"
    set_seed(0)
    dtype = next(model.parameters()).dtype
    items = [(torch.randn(3, pixels, pixels).to(dtype), torch.tensor(i % 2)) for i in range(2 * bs)]
    dls = DataLoaders.from_dsets(items, items[:bs], bs=bs, num_workers=0, device='cpu')
    learn = Learner(dls, model, loss_func=loss, opt_func=opt_func, splitter=splitter, lr=LR, wd=WD, **kwargs)
    unwanted = (ProgressCallback, Recorder) if dtype == torch.float64 else ProgressCallback  # its smoothed loss is a `float32`
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, unwanted)])
    learn.logger = noop
    return learn


def norms(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, NORMS)}


def with_stats(model):
    return {n: m for n, m in norms(model).items() if getattr(m, 'running_mean', None) is not None}


def switched_off(name, p):
    "Whether `p` is a scale or gate that starts at next to nothing, as the layer scale of transformers"
    return p.numel() > 1 and 'bias' not in name and p.abs().max() < 0.1 and bool((p == p.flatten()[0]).all())


def prepare(model, pixels):
    "The statistics of the data, and weights that switch nothing off: what has no effect cannot go wrong"
    torch.manual_seed(0)
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False):
            if isinstance(m, NORMS):
                nn.init.uniform_(p, 0.5, 1.5) if name == 'weight' else nn.init.normal_(p, std=0.2)
            elif switched_off(name, p):
                nn.init.uniform_(p, 0.1, 0.5)
    if with_stats(model):
        learner(model, pixels).recalibrate_bn()
    return model


# --- modes


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same(a, b):
    "Bit for bit, so that NaN is NaN"
    return torch.equal(a, b) or a.detach().contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def copies(model):
    return {n: t.detach().clone() for n, t in tensors(model).items()}


def put_back(model, start):
    with torch.no_grad():
        for n, t in tensors(model).items():
            t.copy_(start[n])


def stats_of(layers, which=STATS):
    "The names of their running statistics"
    return {f'{n}.{k}' if n else k for n in layers for k in which}


def fixed_by(learn, mode, freeze_to):
    "The names of what `mode` on both sides of the freeze point fixes, and the freeze point"
    updates_stats, trains_affine = MODES[mode]
    layers = norms(learn.model)
    affine = {p for layer in layers.values() for p in layer.parameters(recurse=False)}
    frozen = set(learn.opt.param_lists[0]) if freeze_to else set()
    fixed = {n for n, p in learn.model.named_parameters() if (not trains_affine if p in affine else p in frozen)}
    return fixed if updates_stats else fixed | stats_of(with_stats(learn.model))


class OneStep(Callback):
    "One training step; notes what it has to move: parameters with a gradient that counts, statistics of layers that were called"

    def before_fit(self):
        self.names, self.value = set(), float('nan')
        self.handles = [m.register_forward_hook(partial(self.note, n)) for n, m in with_stats(self.model).items()]

    def note(self, name, *_):
        self.names |= stats_of([name], ['num_batches_tracked'])

    def after_backward(self):
        self.value = self.loss.item()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.names |= {n for n, p in self.model.named_parameters() if n in grads and not torch.equal(p - LR * grads[n], p)}

    def after_batch(self):
        raise CancelTrainException

    def before_validate(self):
        raise CancelValidException

    def after_fit(self):
        for h in self.handles:
            h.remove()


def some(names):
    names = sorted(names)
    return names[0] + (f' and {len(names) - 1} more' if names[1:] else '')


def step(learn, mode, freeze_to, start, moves=True):
    "What goes wrong in a step with `mode` on both sides, in words; nothing if all is right"
    learn.freeze_to_bn(freeze_to, bn=mode, bn_above=mode)
    learn.fit(1, cbs=(one := OneStep()))
    model, fixed = learn.model, fixed_by(learn, mode, freeze_to)
    moved = {n for n, t in tensors(model).items() if not same(t, start[n])}
    idle = {n for n, p in model.named_parameters() if n not in fixed and not p.requires_grad}
    still = one.names - fixed - moved if moves else set()
    if moved & fixed:
        return f'moved: {some(moved & fixed)}'
    if idle | still:
        return f'did not move: {some(idle | still)}'
    return '' if one.value == one.value else 'the loss is NaN'


def check_modes(model, pixels, **kwargs):
    "A step in every mode, with everything trained and with all but the head frozen, from the same weights"
    start = copies(model)
    steps_by_name = OF_LARGE if sum(p.numel() for p in model.parameters()) > LARGE else STEPS
    for name, steps in steps_by_name.items():
        learn = learner(model, pixels, OPTIMIZERS[name], bs=2, **kwargs)
        for mode, freeze_to in steps:
            # Adam's steps are no multiples of the gradient, so whether a small one moves anything is not known
            if wrong := step(learn, mode, freeze_to, start, moves=name == 'SGD'):
                return f'wrong: {mode}, freeze_to({freeze_to}), {name}: {wrong}'
            put_back(model, start)
    return 'right'


def check_summary(model, pixels):
    summary: BatchNormSummary = learner(model, pixels).freeze_to_bn(-1).bn_summary()
    n_rows, n_norms = len(summary.df), len(norms(model))
    return 'right' if n_rows == n_norms and f'{n_norms} norm layers' in repr(summary) or not n_norms else f'wrong: {n_rows} rows'


# --- precompute

REASONS = {
    r'random in training: (.+?)\. Set': lambda m: 'random: ' + ', '.join(dict.fromkeys(re.findall(r'\((\w+)\)', m[1]))),
    r'freeze point lies inside (\S+?),? (?:which|at)': r'code between the layers of \1',
    r'The cut would go through (\w+)': r'what \1 does behind the cut needs more than the features',
    r'do not stay as they are, or normalise with the batch: (\{[^}]*\})': r'batch norm without statistics: \1',
    r'writes to a buffer': 'a layer other than batch norm writes to a buffer',
    r'differs by .* from one run to the next': 'features differ from run to run',
    r'Nothing before the first trained': 'nothing frozen comes before the first trained module',
    r'gives a (\w+), not one tensor': r'the frozen part gives a \1',
}


def reason(e):
    "A refusal in a few words"
    for pattern, words in REASONS.items():
        if found := re.search(pattern, str(e), re.DOTALL):
            return words(found) if callable(words) else found.expand(words)
    return str(e)[:120]


class Losses(Callback):
    def before_fit(self):
        self.seen = []

    def after_loss(self):
        self.seen.append(self.loss.item())


def trained(learn):
    "The losses of two epochs"
    set_seed(1)
    learn.fit(2, cbs=(losses := Losses()))
    return torch.tensor(losses.seen, dtype=torch.float64)


def off_by(a, b):
    "The largest difference relative to the largest value of `b`; infinite where there is a NaN"
    off = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-8)).item() if b.numel() else 0.0
    return off if off == off else float('inf')


class Refused(Exception):
    pass


def compare_precomputed(model, pixels, splitter):
    "How far losses and tensors are off after two epochs of the head on stored features; infinitely if nothing was trained"
    start, make = copies(model), partial(learner, model, pixels, splitter=splitter)
    learn = make().freeze_to_bn(-1)
    with ExitStack() as stack:
        try:
            stack.enter_context(learn.precompute())
        except ValueError as e:
            raise Refused(reason(e)) from e
        within = trained(learn)
    after = {n: t.detach().clone() for n, t in tensors(model).items() if not same(t, start[n])}
    put_back(model, start)
    without = trained(make().freeze_to_bn(-1))
    off = max([off_by(within, without), *(off_by(after.get(n, start[n]), t) for n, t in tensors(model).items())])
    put_back(model, start)
    return off if after else float('inf')


def check_precompute(model, pixels, splitter=two_groups):
    "In single precision, and where rounding errors grow in that, in double"
    try:
        off = compare_precomputed(model, pixels, splitter)
        if off < SINGLE:
            return 'exact'
        in_double = compare_precomputed(model.double(), pixels, splitter)
        return f'exact but for rounding ({off:.0e})' if in_double < DOUBLE else f'wrong: off by {off:.1g}'
    except Refused as e:
        return f'refused: {e}'
    finally:
        model.float()


def rates_to_zero(model):
    "As the refusal of random layers says"
    for m in model.modules():
        random = any(word in type(m).__name__.lower() for word in ('drop', 'depth'))
        for k in ('p', 'drop_prob') if random else ('drop_rate', 'dropout'):
            if isinstance(getattr(m, k, None), Number):
                setattr(m, k, 0.0)


def check_remedies(network, model, how, pixels, refused):
    "What becomes of a refused network with the rates of random layers at 0, or else as body and head"
    set_bn_mode(model.float(), 'train')
    rates_to_zero(model)
    told = refused if 'between' in refused else check_precompute(model, pixels)
    if told.startswith('exact'):
        return told.replace('exact', 'exact with rates of 0')
    if 'segmentation' in network.source:  # which has a `unet_learner` instead
        return told
    try:
        set_seed(0)
        model = as_vision_learner(network, how)
        model.eval()(torch.randn(BATCH, 3, pixels, pixels))
    except Exception as e:
        return f'vision_learner cannot build it ({type(e).__name__})'
    rates_to_zero(model[0])
    told = check_precompute(prepare(model, pixels), pixels, splitter=lambda m: [params(m[0]), params(m[1])])
    return told + ' in vision_learner'


# --- fusion


def run(model, x, see):
    "Give outputs and gradients to `see`, one after the other, so that they need not be in memory all at once"

    def take(name, p):
        g, p.grad = p.grad, None
        see(name, g)

    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    handles = [p.register_post_accumulate_grad_hook(partial(take, n)) for n, p in model.named_parameters() if p.requires_grad]
    out = tensors_of(model(x))
    for i, t in enumerate(out):
        see(f'output {i}', t.detach())
    sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in out).backward()
    see('input', x.grad)
    for h in handles:
        h.remove()


class Difference:
    "The largest from `exact`, relative to the size of each tensor; those that should be zero are rounding errors of the larger"

    def __init__(self, exact):
        self.exact, self.seen, self.worst = exact, set(), 0.0
        self.least = 1e-3 * max((t.abs().max().item() for t in exact.values() if t.numel()), default=0)

    def __call__(self, name, t):
        self.seen.add(name)
        if name in self.exact and t.numel():
            size = max(self.exact[name].abs().max().item(), self.least)
            off = (t - self.exact[name]).abs().max().item() / size
            self.worst = max(self.worst, off) if off == off else float('inf')


def compare_fused(model, x):
    "How far outputs and gradients are off with fusion, at first and when it has learned, and the pairs"
    run(model, x, (exact := {}).__setitem__)
    worst = 0.0
    with patch('bnfreeze_fastai.fusion.lazy.pays', lambda *_: True), fused_bn(model) as fusion:  # at any size
        for _ in range(2):
            run(model, x, difference := Difference(exact))
            worst = max(worst, difference.worst if difference.seen == exact.keys() else float('inf'))
    return worst, fusion.pairs


def magnified_rounding(model, x):
    "What the network itself, without fusion, makes of rounding errors in its input: much where attention has to choose"
    run(model, x, (exact := {}).__setitem__)
    run(model, x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)), difference := Difference(exact))
    return difference.worst


def take_statistics_of(model, x):
    "On those of other images, or with layers left out at random, activations and rounding errors can grow from layer to layer"
    set_bn_mode(model, 'train')
    layers = with_stats(model).values()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    with torch.no_grad():
        model(x)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    set_bn_mode(model, 'affine-only')


def in_double(model, x):
    "The model's input, and the model itself, in double precision, or in single where it knows no other"
    try:
        model.double()(x.double())
        return x.double(), DOUBLE, ''
    except RuntimeError:
        model.float()
        return x, SINGLE, ' in single precision'


def check_fusion(model, pixels):
    "Outputs and gradients with and without fusion, through fixed statistics"
    set_bn_mode(model.requires_grad_(True).train(), 'affine-only')
    torch.manual_seed(0)
    x, tolerance, how = in_double(model, torch.randn(2, 3, pixels, pixels))
    worst, pairs = compare_fused(model, x)
    if not worst < tolerance:
        rates_to_zero(model)
        take_statistics_of(model, x)
        worst, pairs = compare_fused(model, x)
        if not worst < tolerance:
            tolerance, how = max(tolerance, min(100 * magnified_rounding(model, x), 1e-6)), how + f' but for rounding ({worst:.0e})'
    if not worst < tolerance:
        return f'wrong: off by {worst:.1g}'
    if pairs.empty:
        return f'left alone{how}'
    left = len(with_stats(model)) - pairs.batch_norm.nunique()
    return f'{len(pairs)} pair{"s" * (len(pairs) > 1)} exact{how}, {left} left'
