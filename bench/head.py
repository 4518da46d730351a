"What head training costs under `freeze_to_bn(-1)`, folded or not, against fastai's `freeze()` and the bare forward pass of the frozen body"

import sys
from functools import partial
from statistics import median

import pandas as pd, torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import create_vision_model, model_meta
from fastcore.basics import noop
from fastprogress.fastprogress import progress_bar
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, seconds
from bnfreeze_fastai.freeze.callback import active_callback
from bnfreeze_fastai.holds import holds_on
from bnfreeze_fastai.layers import bn_layers
from bnfreeze_fastai.utils.tensors import fingerprint
import bnfreeze_fastai.learner

AT = Scale(rounds=3)


class TrainOnly(Callback):
    "Skip validation within a fit, so that its time is that of training"

    def before_validate(self):
        raise CancelValidException()


def make_learner(arch, at=AT):
    torch.manual_seed(0)
    x = torch.randn(at.n_batches * at.batch, 3, at.size, at.size).to(at.device)  # no loader is to be measured
    dls = DataLoaders.from_dsets([(im, i % 10) for i, im in enumerate(x)], [(x[0], 0)], bs=at.batch, num_workers=0, device=at.device)
    model = create_vision_model(getattr(models, arch), 10, pretrained=False)
    learn = Learner(
        dls, model, loss_func=CrossEntropyLossFlat(), splitter=model_meta[getattr(models, arch)]['split'], lr=1e-4, cbs=TrainOnly()
    )
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def fastai_freeze(learn):
    learn.freeze()
    learn.fit(1)


def freeze_to_bn(learn):
    learn.freeze_to_bn(-1)
    learn.fit(1)
    learn.remove_cb(active_callback(learn))


def enter_fold(learn, fit=noop):
    learn.freeze_to_bn(-1)
    with learn.fold_frozen():
        fit(1)
    learn.remove_cb(active_callback(learn))


def fold_frozen(learn):
    enter_fold(learn, learn.fit)


@torch.no_grad()
def forward_pass(learn):
    learn.model.eval()
    for x, _ in learn.dls.train:
        learn.model[0](x)


VARIANTS = {f.__name__: f for f in (fastai_freeze, freeze_to_bn, fold_frozen, enter_fold, forward_pass)}


def time_variants(arch, at=AT):
    "Median over rounds of each variant's epoch, and of its ratio to the others in the same round"
    learn = make_learner(arch, at)
    for f in VARIANTS.values():
        f(learn)  # warm up, and statistics to hold
    rounds = pd.DataFrame([{name: seconds(f, learn) for name, f in VARIANTS.items()} for _ in progress_bar(range(at.rounds))])
    rounds['folded'] = rounds['fold_frozen'] - rounds['enter_fold']  # its block is entered once, whatever the number of epochs
    ratio = lambda own, other: (rounds[own] / rounds[other]).median()
    return {
        'epoch, s': rounds['freeze_to_bn'].median(),
        '÷ fastai freeze()': ratio('freeze_to_bn', 'fastai_freeze'),
        '÷ forward pass': ratio('freeze_to_bn', 'forward_pass'),
        'fold_frozen ÷ fastai freeze()': ratio('folded', 'fastai_freeze'),
        'fold_frozen ÷ forward pass': ratio('folded', 'forward_pass'),
        'entering it, batches': at.n_batches * ratio('enter_fold', 'folded'),
    }


class StepCost(Callback):
    "Times the events of `BatchNormFreeze` in a training step, its hooks on every held layer, and the step itself"

    order = 1000

    def __init__(self):
        self.own = []

    def after_batch(self):
        cb, repeats = active_callback(self.learn), 20
        layers = bn_layers(self.learn.model[0])
        holds = [holds_on(l)[-1] for l in layers]

        def step():
            for _ in range(repeats):
                cb.before_batch()
                for l in layers:
                    l.training = True  # as after a stray `.train()`: the hooks have work to do
                for hold, l in zip(holds, layers):
                    hold.enter(l, ()), hold.leave(l, (), None)
                cb.after_pred()
                cb.before_step()
                cb.after_batch()

        self.own.append(seconds(step) / repeats)


def callback_cost(arch, at=AT):
    "The callback's own time per training step and per epoch"
    learn, cost = make_learner(arch, at), StepCost()
    learn.fit(1)
    learn.freeze_to_bn(-1)
    learn.fit(1, cbs=cost)
    step = min(seconds(learn.fit, 1) for _ in range(3)) / at.n_batches
    frozen = learn.model[0].state_dict().values()
    return {
        'per step, ms': 1e3 * median(cost.own),
        'a step, ms': 1e3 * step,
        'per step, %': 100 * median(cost.own) / step,
        'verify per epoch, ms': 1e3 * seconds(lambda: [fingerprint(t) for _ in range(2) for t in frozen]),  # after training, and at the end
    }


TABLES = {
    'Head training, time of an epoch': time_variants,
    'Head training, peak memory added': partial(
        compare_memory, 'bench.head', names=[v for v in VARIANTS if v != 'enter_fold'], own='freeze_to_bn', other='fastai_freeze'
    ),
    "The callback's own cost": callback_cost,
}

if __name__ == '__main__':
    arch, variant = sys.argv[1:]
    print(added_memory(VARIANTS[variant], make_learner(arch)))
