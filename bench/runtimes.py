"Half precision with a gradient scaler, CUDA graphs and `torch.compile`: parts of `make gpu`, each by network and `Scale`"

from functools import partial

import torch, torch.nn.functional as F
from fastai.callback.core import Callback

from bench import frozen_part, fusion, head
from bench.measure import medians
from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.layers import norm_layers, stats_buffers
from bnfreeze_fastai.utils.tensors import fingerprints


def of_stats(model):
    "Fingerprints of all running statistics"
    return fingerprints(b for l in norm_layers(model).values() for b in stats_buffers(l).values())


class Overflow(Callback):
    "Makes the input of the second batch infinite, so that a gradient scaler skips its step"

    order, skipped = 9, 0  # before fastai's `MixedPrecision`

    def before_batch(self):
        if self.training and self.iter == 1:
            self.learn.xb = (self.xb[0] * float('inf'),)

    def after_cancel_step(self):
        self.skipped += 1


def precision(arch, at):
    "Head training in half precision, ÷ single; then with a batch that is not finite: what is fixed stays, and nothing becomes NaN"
    figures, finite = {}, lambda tensors: all(t.isfinite().all().item() for t in tensors)
    for half in ('to_fp16', 'to_bf16'):
        learn = head.make_learner(arch, at)
        learn.fit(1)
        learn.freeze_to_bn(-1)
        body = learn.model[0].state_dict().values()
        before, bad = fingerprints(body), Overflow()

        def in_half(*cbs):
            getattr(learn, half)()
            learn.fit(1, cbs=cbs)
            learn.to_fp32()

        figures[half] = medians({half: in_half}, partial(learn.fit, 1), at.rounds)[half]
        if half == 'to_fp16':  # the other has no scaler, as it needs none
            in_half(bad)
            figures |= {f'{half}, steps skipped': bad.skipped, f'{half}, weights finite': finite(learn.model.parameters())}
        figures |= {f'{half}, frozen moved': fingerprints(body) != before, f'{half}, statistics finite': finite(learn.model.buffers())}
    return figures


def as_graph(f):
    "`f` captured as a CUDA graph, as a function that replays it"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def graphs(arch, at):
    "A forward and a backward pass as a CUDA graph, ÷ the same without; whether its replays move statistics as the mode says"
    if at.device != 'cuda':
        raise ValueError('CUDA graphs need a GPU')
    figures = {}
    for mode in ('train', 'affine-only', 'frozen'):
        model, x, y = fusion.make(arch, at)
        with hold_bn_mode(model, mode):
            step = lambda: F.cross_entropy(model(x), y).backward()
            step()
            replay = as_graph(step)
            figures[mode] = medians({mode: replay}, step, at.rounds)[mode]
            before = of_stats(model)
            replay()
            figures[f'{mode}, moved'] = of_stats(model) != before
    return figures


def compiled_step(arch, at):
    "`torch.compile` of a training step through fixed statistics, ÷ the same without; compiling is not counted"
    model, x, y = fusion.make(arch, at)
    step = lambda m: F.cross_entropy(m(x), y).backward()
    with hold_bn_mode(model, 'affine-only'):
        before, fast = of_stats(model), torch.compile(model)
        figures = medians({'affine-only': partial(step, fast)}, partial(step, model), at.rounds)
    return figures | {'affine-only moved': of_stats(model) != before}


def compiled_body(arch, at):
    return frozen_part.time_forward_passes(arch, at)
