"What `recalibrate_bn` costs, against a bare forward pass over the same batches, in evaluation, in training mode, and `update_bn` of torch"

import sys
from functools import partial

import pandas as pd, torch
from fastprogress.fastprogress import progress_bar
from torch.optim.swa_utils import update_bn
from torchvision import models

from bench.measure import BATCH, SIZE, added_memory, compare_memory, ratios_to
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

ROUNDS, N_BATCHES = 5, 8


def model_and_batches(arch):
    torch.manual_seed(0)
    return getattr(models, arch)(), [torch.randn(BATCH, 3, SIZE, SIZE) for _ in range(N_BATCHES)]


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


def time_passes(arch):
    "Median over rounds of each variant's time, as a ratio to the mean of the forward passes just before and just after it"
    args = model_and_batches(arch)
    for f in (forward_pass, *VARIANTS.values()):
        f(*args)  # warm up

    plain, own = partial(forward_pass, *args), {name: partial(f, *args) for name, f in VARIANTS.items()}
    rounds = pd.DataFrame([ratios_to(plain, own) for _ in progress_bar(range(ROUNDS))])
    return {f'{name} ÷ forward pass': rounds[name].median() for name in VARIANTS}


TABLES = {
    f'Re-estimating statistics over {N_BATCHES} batches, time': time_passes,
    f'Re-estimating statistics over {N_BATCHES} batches, peak memory added': partial(
        compare_memory,
        'bench.recalibration',
        names=['forward_pass', *VARIANTS],
        own='recalibrate_bn',
        other='forward_pass',
    ),
}

if __name__ == '__main__':
    arch, variant = sys.argv[1:]
    print(added_memory({'forward_pass': forward_pass, **VARIANTS}[variant], *model_and_batches(arch)))
