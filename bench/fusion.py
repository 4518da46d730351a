"Full fine-tuning through fixed statistics: two layers or one (`fused_bn`), against training mode; time, memory, bytes kept by autograd"

import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pandas as pd, torch, torch.nn.functional as F
from fastprogress.fastprogress import progress_bar
from torchvision import models

from bench.measure import Scale, added_memory, compare_memory, ratio_to
from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes

AT = Scale(rounds=3, size=224, batch=64)


@contextmanager
def fused(model):
    with hold_bn_mode(model, 'affine-only'), fused_bn(model):
        yield


VARIANTS = {
    'training mode': nullcontext,
    'fixed statistics': partial(hold_bn_mode, mode='affine-only'),
    'fused': fused,
}


def make(arch, at=AT):
    torch.manual_seed(0)
    x, y = torch.randn(at.batch, 3, at.size, at.size), torch.randint(1000, (at.batch,))
    return getattr(models, arch)().to(at.device).train(), x.to(at.device), y.to(at.device)


def step(block, model, x, y):
    "A forward and a backward pass"
    model.zero_grad()
    with block(model):
        F.cross_entropy(model(x), y).backward()


def time_steps(arch, at=AT):
    "Median over rounds of each variant's time, as a ratio to the mean of the steps in training mode just before and just after it"
    task = make(arch, at)
    for block in VARIANTS.values():
        step(block, *task)
    plain, others = partial(step, nullcontext, *task), list(VARIANTS)[1:]
    rounds = [{v: ratio_to(plain, partial(step, VARIANTS[v], *task)) for v in others} for _ in progress_bar(range(at.rounds))]
    return pd.DataFrame(rounds).median().to_dict()


def compare_kept(arch, at=AT):
    "MiB that autograd keeps, in single precision and under autocast to bfloat16"
    (model, x, _), row = make(arch, at), {}
    for name, autocast in (('float32', nullcontext()), ('bfloat16', torch.autocast(at.device, dtype=torch.bfloat16))):
        kept = {}
        for v, block in VARIANTS.items():
            with autocast, block(model):
                kept[v] = kept_bytes(model, x) / 2**20
        row |= {f'{v}, {name}': mib for v, mib in kept.items()} | {f'fused ÷ training, {name}': kept['fused'] / kept['training mode']}
    return row


def memory_of(arch, name):
    "MiB that a step adds at its peak to a process that has taken one on two images"
    model, x, y = make(arch)
    step(VARIANTS[name], model, x[:2], y[:2])
    return added_memory(step, VARIANTS[name], model, x, y)


def compare_peaks(arch):
    "Peak memory, each variant in a process of its own"
    return compare_memory('bench.fusion', arch, VARIANTS, 'fused', 'training mode')


TITLE = f'Full fine-tuning, {AT.size} px, batches of {AT.batch}'
TABLES = {
    f'{TITLE}: peak memory that a step adds': compare_peaks,  # first: what the others leave allocated is not theirs to have
    f'{TITLE}: what autograd keeps, MiB': compare_kept,
    f'{TITLE}: a step, ÷ in training mode': time_steps,
}

if __name__ == '__main__':
    print(memory_of(*sys.argv[1:]))
