"Full fine-tuning through fixed statistics: two layers or one (`fused_bn`), against training mode; time, memory, bytes kept by autograd"

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pandas as pd, torch, torch.nn.functional as F
from fastprogress.fastprogress import progress_bar
from torchvision import models

from bench.measure import added_memory, compare_memory, ratio_to
from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes

CASES = {  # to network, pixels, images in a batch, rounds, and steps in each
    'resnet18, 64 px, 16 images': ('resnet18', 64, 16, 15, 8),
    'mobilenet_v3_large, 128 px, 16 images': ('mobilenet_v3_large', 128, 16, 9, 4),
    'resnet50, 128 px, 16 images': ('resnet50', 128, 16, 5, 3),
    'resnet50, 224 px, 64 images': ('resnet50', 224, 64, 3, 1),
}


@contextmanager
def fused(model):
    with hold_bn_mode(model, 'affine-only'), fused_bn(model):
        yield


VARIANTS = {
    'training mode': nullcontext,
    'fixed statistics': partial(hold_bn_mode, mode='affine-only'),
    'fused': fused,
}


def make(case):
    torch.manual_seed(0)
    arch, size, n = CASES[case][:3]
    return getattr(models, arch)().train(), torch.randn(n, 3, size, size), torch.randint(1000, (n,))


def steps(n, block, model, x, y):
    "Forward and backward passes in one block, as in an epoch"
    with block(model):
        for _ in range(n):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()


def time_steps(case):
    "Median over rounds of each variant's time, as a ratio to the mean of the steps in training mode just before and just after it"
    task, (n_rounds, n) = make(case), CASES[case][3:]
    for block in VARIANTS.values():
        steps(1, block, *task)
    plain, others = partial(steps, n, nullcontext, *task), list(VARIANTS)[1:]
    rounds = [{v: ratio_to(plain, partial(steps, n, VARIANTS[v], *task)) for v in others} for _ in progress_bar(range(n_rounds))]
    return pd.DataFrame(rounds).median().to_dict()


def compare_kept(case):
    "MiB that autograd keeps, in single precision and under autocast to bfloat16"
    (model, x, _), row = make(case), {}
    for name, autocast in (('float32', nullcontext()), ('bfloat16', torch.autocast('cpu', dtype=torch.bfloat16))):
        kept = {}
        for v, block in VARIANTS.items():
            with autocast, block(model):
                kept[v] = kept_bytes(model, x) / 2**20
        row |= {f'{v}, {name}': mib for v, mib in kept.items()} | {f'fused ÷ training, {name}': kept['fused'] / kept['training mode']}
    return row


def memory_of(case, name):
    "MiB that a step adds at its peak to a process that has taken one on two images"
    model, x, y = make(case)
    steps(1, VARIANTS[name], model, x[:2], y[:2])
    return added_memory(steps, 1, VARIANTS[name], model, x, y)


def compare_peaks(case):
    "Peak memory, each variant in a process of its own"
    return compare_memory('bench.fusion', case, VARIANTS, 'fused', 'training mode')


TITLE = 'Full fine-tuning'
TABLES = {
    f'{TITLE}: peak memory that a step adds': compare_peaks,  # first: what the others leave allocated is not theirs to have
    f'{TITLE}: what autograd keeps, MiB': compare_kept,
    f'{TITLE}: a step, ÷ in training mode': time_steps,
}

if __name__ == '__main__':
    print(memory_of(*sys.argv[1:]))
