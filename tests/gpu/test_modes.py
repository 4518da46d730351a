"Modes, and what belongs to them, on the device that `--device` names"

from functools import partial

import pytest, torch
from bench.runtimes import as_graph, Overflow
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.learner import load_learner
from learners import make_learner, pretrained
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.layers import MODES, bn_layers
from bnfreeze_fastai.utils.restore import kept_rng
from bnfreeze_fastai.utils.tensors import copies, fingerprint

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('ignore:.*CUDA is not available')]


def plain(learn):
    return learn


HALF = {'float32': plain, 'fp16': lambda learn: learn.to_fp16(), 'bf16': lambda learn: learn.to_bf16()}


@pytest.mark.parametrize('precision', HALF)
@pytest.mark.parametrize('mode', MODES)
def test_a_fit_moves_what_the_mode_says(device, mode, precision):
    learn = HALF[precision](pretrained(device=device)).freeze_to_bn(-1, bn=mode)
    learn.model.to(device, memory_format=torch.channels_last)
    body = Body(learn.model[0])
    learn.fit(2)
    assert {p.device.type for p in learn.model.parameters()} == {torch.device(device).type}
    assert body.moved(learn.model[0]) == may_move(mode)


def test_a_scaler_skips_a_step(gpu):
    learn, bad = pretrained(device=gpu).to_fp16().freeze_to_bn(0, bn_above='train'), Overflow()
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(1, cbs=bad)
    assert bad.skipped and all(t.isfinite().all() for t in learn.model.state_dict().values())


class Looks(TorchFunctionMode):
    "Counts what a GPU would have to be waited for: reads of values, and copies to the CPU"

    READS = ('__bool__', '__float__', '__int__', 'item', 'tolist', 'numpy', 'cpu', 'equal', 'allclose', 'nonzero')

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__ in self.READS
        return func(*args, **kwargs or {})


class PerStep(Callback):
    "How often each step waits for the device"

    order = -100

    def __init__(self):
        self.seen = []

    def before_batch(self):
        self.looks = Looks()
        self.looks.__enter__()


class AtItsEnd(Callback):
    order = 1000

    def after_batch(self):
        self.per_step.looks.__exit__(None, None, None)
        if self.training:
            self.per_step.seen.append(self.per_step.looks.count)


def waits(learn):
    steps = PerStep()
    learn.fit(1, cbs=[steps, AtItsEnd()])
    return steps.seen[1:]  # the first step of an epoch looks at what is fixed, too


def deep(n):
    body = nn.Sequential(*(m for _ in range(n) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())))
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


@pytest.mark.parametrize('n', [1, 6])
def test_a_step_waits_twice_for_the_device_whatever_the_number_of_layers(device, n):
    of_fastai = waits(make_learner(deep(n), device=device))
    assert waits(make_learner(deep(n), device=device).freeze_to_bn(0)) == [k + 2 for k in of_fastai]
    assert waits(make_learner(deep(n), device=device).freeze_to_bn(-1)) == of_fastai  # nothing moves that could be spoilt


def test_verify_sees_a_single_bit(device):
    for t in (torch.randn(4, 3, 5, 5), torch.arange(3), torch.randn(8).half(), torch.randn(8).bfloat16()):
        there = t.clone().to(device)
        assert fingerprint(there) == fingerprint(t)
        if t.dim() == 4:
            assert fingerprint(there.contiguous(memory_format=torch.channels_last)) == fingerprint(t)
        there.view(-1).view(torch.uint8)[1] ^= 1
        assert fingerprint(there) != fingerprint(t)


def test_copies_are_of_each_device_and_type(device):
    tensors = [torch.randn(3), torch.randn(2, 2).half().to(device), torch.tensor(5).to(device), torch.randn(4, device=device)]
    for found, where in ((copies(tensors), None), (copies(tensors, 'cpu'), 'cpu')):
        for t, copy in zip(tensors, found, strict=True):
            assert copy.device.type == (where or t.device.type) and copy.dtype == t.dtype
            assert torch.equal(copy.cpu(), t.cpu()) and copy.data_ptr() != t.data_ptr()


def test_random_numbers_of_the_device_are_kept(device):
    draw = lambda: torch.rand(3, device=device).tolist()
    draw()
    with kept_rng():
        first = draw()
    assert draw() == first


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_recomputed_pass_counts_once(device, reentrant):
    "The backward pass of a GPU runs in a thread of its own"

    def trained(recompute):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to(device)
        x = torch.randn(5, 3, 8, 8).to(device).requires_grad_()
        with hold_bn_mode(model, 'frozen', layers='3'), hold_bn_mode(model, 'train', layers='1'):
            out = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            out.square().mean().backward()
        return model

    once, twice = trained(False), trained(True)
    for a, b in zip(bn_layers(once), bn_layers(twice)):
        torch.testing.assert_close(b.running_mean, a.running_mean)
        assert b.num_batches_tracked == a.num_batches_tracked


def test_a_learner_exported_there_is_loaded_on_the_cpu(device):
    learn = pretrained(device=device).freeze_to_bn(-1, bn='affine-only')
    learn.fit(1)
    learn.export('it.pkl')
    loaded = load_learner('it.pkl', cpu=True)
    assert {p.device.type for p in loaded.model.parameters()} == {'cpu'}
    assert list(loaded.bn_summary().df['mode']) == list(learn.bn_summary().df['mode'])


def test_a_graph_replays_the_mode_that_it_was_captured_in(gpu):
    for mode in ('train', 'frozen'):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(gpu)
        x = torch.randn(4, 3, 8, 8, device=gpu)
        model(x)
        with hold_bn_mode(model, mode):
            with torch.no_grad():
                replay = as_graph(partial(model, x))
            before = fingerprint(model[1].running_mean)
            replay()
            torch.cuda.synchronize()
        assert (fingerprint(model[1].running_mean) != before) == (mode == 'train')
