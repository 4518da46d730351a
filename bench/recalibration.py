"What `recalibrate_bn` costs, against a bare forward pass over the same batches, in evaluation, in training mode, and `update_bn` of torch"

import sys
from functools import partial

import torch
from torch.optim.swa_utils import update_bn
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, medians
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

AT = Scale(rounds=5, n_batches=8)


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
    variants = {f'{name} ÷ forward pass': partial(f, *args) for name, f in VARIANTS.items()}
    return medians(variants, partial(forward_pass, *args), at.rounds)


TABLES = {
    f'Re-estimating statistics over {AT.n_batches} batches, time': time_passes,
    f'Re-estimating statistics over {AT.n_batches} batches, peak memory added': partial(
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
