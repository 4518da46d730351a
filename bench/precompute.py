"What head training costs on stored features, against fastai's `freeze()`, one forward pass over all data, and training the head alone"

import sys
from functools import partial
from itertools import islice

import pandas as pd, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.vision.learner import create_vision_model, model_meta
from fastcore.basics import noop
from fastprogress.fastprogress import progress_bar
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, medians, seconds
from bnfreeze_fastai.freeze.callback import active_callback
import bnfreeze_fastai.learner

N_EPOCH, AT = 5, Scale(rounds=3, batch=64, n_batches=7)
MANY = AT._replace(size=32, n_batches=70)  # features are of the same size


def make_learner(arch, at=AT):
    "Images of which a batch is for validation"
    torch.manual_seed(0)
    n = at.n_batches * at.batch
    images = torch.randn(n + at.batch, 3, at.size, at.size).to(at.device)
    samples = [(x, i % 10) for i, x in enumerate(images)]
    dls = DataLoaders.from_dsets(samples[:n], samples[n:], bs=at.batch, num_workers=0, device=at.device)
    model = create_vision_model(getattr(models, arch), 10, pretrained=False).to(at.device)
    return plain_learner(dls, model, model_meta[getattr(models, arch)]['split'])


def plain_learner(dls, model, splitter):
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=splitter, lr=1e-4)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn


def fastai_freeze(learn):
    learn.freeze()
    learn.fit(N_EPOCH)


def freeze_to_bn(learn):
    learn.freeze_to_bn(-1)
    learn.fit(N_EPOCH)
    learn.remove_cb(active_callback(learn))


def precompute(learn):
    learn.freeze_to_bn(-1)
    with learn.precompute():
        learn.fit(N_EPOCH)
    learn.remove_cb(active_callback(learn))


@torch.no_grad()
def forward_pass(learn):
    learn.model.eval()
    for dl in learn.dls.loaders:
        for x, _ in dl.new(shuffle=False, drop_last=False):
            learn.model[0](x)


def time_five_epochs(arch, at=AT):
    "Median over rounds, and ratios within a round"
    learn = make_learner(arch, at)
    forward_pass(learn)
    variants = (fastai_freeze, freeze_to_bn, precompute, forward_pass)
    rounds = pd.DataFrame([{f.__name__: seconds(f, learn) for f in variants} for _ in progress_bar(range(at.rounds))])
    ratio = lambda other: (rounds['precompute'] / rounds[other]).median()
    return {
        'five epochs, s': rounds['precompute'].median(),
        '÷ fastai freeze()': ratio('fastai_freeze'),
        '÷ freeze_to_bn': ratio('freeze_to_bn'),
        '÷ forward pass': ratio('forward_pass'),
    }


def features_and_labels(learn):
    "What the head sees behind its pooling, by hand"
    learn.model.eval()
    batches = [[(learn.model[1][:2](learn.model[0](x)), y) for x, y in dl.new(shuffle=False, drop_last=False)] for dl in learn.dls.loaders]
    return [[torch.cat(o) for o in zip(*bs)] for bs in batches]


def bare_loop(head, opt, data, bs, n_epoch):
    "Training and validation with the same optimizer and loss, and nothing else"
    (x, y), (x_valid, y_valid) = data
    for _ in range(n_epoch):
        head.train()
        order = torch.randperm(len(x))
        for i in range(0, len(x) - bs + 1, bs):
            rows = order[i : i + bs]
            nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        head.eval()
        with torch.no_grad():
            for i in range(0, len(x_valid), bs):
                nn.functional.cross_entropy(head(x_valid[i : i + bs]), y_valid[i : i + bs])


def time_later_epochs(arch, at=AT, n_epoch=20):
    "Epochs on stored features beside a Learner of the head on a `TensorDataset` of them, and beside a bare loop"
    learn = make_learner(arch, at)
    with torch.no_grad():
        data = features_and_labels(learn)
    head = learn.model[1][2:]
    opt = Adam([list(head.parameters())], lr=1e-4)
    dls = DataLoaders.from_dsets(*[TensorDataset(*d) for d in data], bs=at.batch, num_workers=0, device=at.device)
    on_features = plain_learner(dls, head, lambda m: [list(m.parameters())])
    learn.freeze_to_bn(-1)
    with learn.precompute():
        variants = {
            'own': partial(learn.fit, n_epoch),
            'learner': partial(on_features.fit, n_epoch),
            'bare': partial(bare_loop, head, opt, data, at.batch, n_epoch),
        }
        rows = [{name: seconds(f) for name, f in variants.items()} for _ in progress_bar(range(at.rounds + 3))]
    rounds = pd.DataFrame(rows[1:])  # the first warms up
    return {
        'samples': len(data[0][0]),
        'epoch, ms': 1e3 * rounds['own'].median() / n_epoch,
        '÷ Learner on a TensorDataset of features': (rounds['own'] / rounds['learner']).median(),
        '÷ bare loop': (rounds['own'] / rounds['bare']).median(),
    }


def time_entering(arch, at=AT):
    "Entering the block, as a ratio to one forward pass over all data and two batches more"
    learn = make_learner(arch, at).freeze_to_bn(-1)

    def enter():
        with learn.precompute():
            pass

    @torch.no_grad()
    def allowed():
        forward_pass(learn)
        for x, _ in islice(learn.dls.train, 2):
            learn.model[0](x)

    return medians({'entering ÷ a pass and two batches': enter}, allowed, at.rounds + 2)


VARIANTS = {f.__name__: f for f in (fastai_freeze, freeze_to_bn, precompute, forward_pass)}

TABLES = {
    'Five epochs of head training on stored features, the pass that stores them included, time': time_five_epochs,
    'Entering the block, time': time_entering,
    'Epochs after the first, time': time_later_epochs,
    'Epochs after the first of ten times as many small images, time': partial(time_later_epochs, at=MANY, n_epoch=3),
    'Five epochs of head training on stored features, peak memory added': partial(
        compare_memory, 'bench.precompute', names=VARIANTS, own='precompute', other='fastai_freeze'
    ),
}

if __name__ == '__main__':
    arch, variant = sys.argv[1:]
    print(added_memory(VARIANTS[variant], make_learner(arch)))
