"What `recalibrate_bn` costs, against a bare forward pass over the same batches, in evaluation, in training mode, and `update_bn` of torch"

import sys
from functools import partial

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar
from torch.optim.swa_utils import update_bn
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, ratio_to
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

AT = Scale(rounds=7)


def model_and_batches(arch, at=AT):
    torch.manual_seed(0)
    batches = [torch.randn(at.batch, 3, at.size, at.size).to(at.device) for _ in range(at.n_batches)]
    return getattr(models, arch)().to(at.device), batches


@torch.no_grad()
def forward_pass(model, batches, training=False):
    model.train(training)
    for x in batches:
        model(x)


def torch_update_bn(model, batches):
    update_bn(batches, model)


recalibrate = partial(recalibrate_bn, progress=False)
VARIANTS = {
    'recalibrate_bn': recalibrate,
    'sequential': partial(recalibrate, method='sequential'),
    'update_bn': torch_update_bn,
    'training-mode pass': partial(forward_pass, training=True),
}


def time_passes(arch, at=AT):
    "Median over rounds of each variant's time, as a ratio to the mean of the forward passes just before and just after it"
    args = model_and_batches(arch, at)
    for f in (forward_pass, *VARIANTS.values()):
        f(*args)  # warm up

    plain = partial(forward_pass, *args)
    rounds = pd.DataFrame(
        [{name: ratio_to(plain, partial(f, *args)) for name, f in VARIANTS.items()} for _ in progress_bar(range(at.rounds))]
    )
    return {f'{name} ÷ forward pass': rounds[name].median() for name in VARIANTS}


TABLES = {
    'Re-estimating statistics, time': time_passes,
    'Re-estimating statistics, peak memory added': partial(
        compare_memory,
        'bench.recalibration',
        names=['forward_pass', 'recalibrate_bn', 'sequential', 'update_bn'],
        own='recalibrate_bn',
        other='forward_pass',
    ),
}

if __name__ == '__main__':
    arch, variant = sys.argv[1:]
    print(added_memory({'forward_pass': forward_pass, **VARIANTS}[variant], *model_and_batches(arch)))
