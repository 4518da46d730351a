"Full fine-tuning through fixed statistics: two layers or one (`fused_bn`), against training mode; time, memory, bytes kept by autograd"

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import torch, torch.nn.functional as F
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, medians
from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes

CASES = {  # to network and scale, in which `n_batches` are the steps of a round
    'resnet18, 64 px, 16 images': ('resnet18', Scale(rounds=15, size=64, n_batches=8)),
    'mobilenet_v3_large, 128 px, 16 images': ('mobilenet_v3_large', Scale(rounds=9, n_batches=4)),
    'resnet50, 128 px, 16 images': ('resnet50', Scale(rounds=5, n_batches=3)),
    'resnet50, 224 px, 64 images': ('resnet50', Scale(rounds=3, size=224, batch=64, n_batches=1)),
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


def make(arch, at):
    torch.manual_seed(0)
    x, y = torch.randn(at.batch, 3, at.size, at.size), torch.randint(1000, (at.batch,))
    return getattr(models, arch)().to(at.device).train(), x.to(at.device), y.to(at.device)


def steps(n, block, model, x, y):
    "Forward and backward passes in one block, as in an epoch"
    with block(model):
        for _ in range(n):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()


def time_steps(arch, at):
    "Median over rounds of each variant's time, as a ratio to the mean of the steps in training mode just before and just after it"
    task, plain, *others = make(arch, at), *VARIANTS
    blocks = {v: partial(steps, at.n_batches, VARIANTS[v], *task) for v in VARIANTS}
    return medians({v: blocks[v] for v in others}, blocks[plain], at.rounds)


def compare_kept(arch, at):
    "MiB that autograd keeps, in single precision and under autocast to bfloat16"
    (model, x, _), row = make(arch, at), {}
    for name, autocast in (('float32', nullcontext()), ('bfloat16', torch.autocast(at.device, dtype=torch.bfloat16))):
        kept = {}
        for v, block in VARIANTS.items():
            with autocast, block(model):
                kept[v] = kept_bytes(model, x) / 2**20
        row |= {f'{v}, {name}': mib for v, mib in kept.items()} | {f'fused ÷ training, {name}': kept['fused'] / kept['training mode']}
    return row


def memory_of(case, name):
    "MiB that a step adds at its peak to a process that has taken one on two images"
    model, x, y = make(*CASES[case])
    steps(1, VARIANTS[name], model, x[:2], y[:2])
    return added_memory(steps, 1, VARIANTS[name], model, x, y)


def compare_peaks(case):
    "Peak memory, each variant in a process of its own"
    return compare_memory('bench.fusion', case, VARIANTS, 'fused', 'training mode')


TITLE = 'Full fine-tuning'
TABLES = {
    f'{TITLE}: peak memory that a step adds': compare_peaks,  # first: what the others leave allocated is not theirs to have
    f'{TITLE}: what autograd keeps, MiB': lambda case: compare_kept(*CASES[case]),
    f'{TITLE}: a step, ÷ in training mode': lambda case: time_steps(*CASES[case]),
}

if __name__ == '__main__':
    print(memory_of(*sys.argv[1:]))
