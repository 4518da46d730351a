"What makes the forward pass of a frozen body faster: folded batch norm, channels_last, both (`fold_frozen`), `torch.compile`"

from copy import deepcopy
from functools import partial

import timm, torch
from fastai.vision.learner import create_body
from torchvision import models

from bench.measure import Scale, medians
from bnfreeze_fastai.head.fold import folded
from bnfreeze_fastai.head.resume import relative_error
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

AT, REPEATS = Scale(rounds=7), 4


def make_body(arch):
    torch.manual_seed(0)
    if hasattr(models, arch):
        return create_body(getattr(models, arch)(), pretrained=False)
    return timm.create_model(arch, num_classes=0, global_pool='')


def compiled(body, x, freezing):
    "Compiled and warmed up"
    torch.compiler.reset()
    with torch._inductor.config.patch(freezing=freezing):
        run = torch.compile(body)
        run(x), run(x)
    return run


def variants(body, x, compiles):
    channels_last = lambda m: deepcopy(m).to(memory_format=torch.channels_last)
    fast = folded([body], x[:2])
    as_channels_last = x.to(memory_format=torch.channels_last)
    layouts = {
        'folded': (deepcopy(fast).to(memory_format=torch.contiguous_format), x),
        'channels_last': (channels_last(body), as_channels_last),
        'fold_frozen': (fast, as_channels_last),
    }
    kinds = {'compile': (body, False), 'compile, freezing': (deepcopy(body), True)} if compiles else {}
    return layouts | {name: (compiled(m, x, freezing), x) for name, (m, freezing) in kinds.items()}


@torch.no_grad()
def time_forward_passes(arch, at=AT, compiles=True):
    "Median over rounds of each variant's time, as a ratio to the mean of the plain passes just before and just after it"
    body, x = make_body(arch).to(at.device), torch.randn(at.batch, 3, at.size, at.size).to(at.device)
    recalibrate_bn(body, [x], progress=False)
    body.eval()

    def run(m, x):
        for _ in range(REPEATS):
            m(x)

    own = variants(body, x, compiles)
    off = relative_error(own['fold_frozen'][0](x), body(x))
    found = medians({name: partial(run, *v) for name, v in own.items()}, partial(run, body, x), at.rounds)
    return {**found, 'fold_frozen - plain': f'{off:.0e}'}


TABLES = {'Forward pass of the frozen body in evaluation mode, ÷ plain': time_forward_passes}
