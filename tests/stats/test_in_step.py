"Re-estimation in step, against one layer at a time"

import gc, signal, threading, time, warnings
from copy import deepcopy

import pytest, torch, torch.nn.functional as F
from conftest import on_linux
from fastai.callback.hook import hook_output
from learners import bits, same
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet121, mobilenet_v2, resnet18

from bnfreeze_fastai.core import bn_mode, set_bn_mode
from bnfreeze_fastai.layers import bn_layers, named_modules
from bnfreeze_fastai.stats.in_step import observe_in_step
from bnfreeze_fastai.stats.observe import observe
from bnfreeze_fastai.stats.one_by_one import OneByOne
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn


@pytest.fixture(autouse=True)
def no_threads_left():
    before = threading.active_count()
    yield
    gc.collect()
    assert threading.active_count() == before


def net(n=3):
    torch.manual_seed(0)
    conv = lambda i: [nn.Conv2d(i, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*conv(3), *[m for _ in range(n - 1) for m in conv(4)])


def images(sizes=(6, 6, 2), px=8):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, px, px, generator=g) * (i + 1) + i for i, n in enumerate(sizes)]


def team(model):
    return OneByOne({l.running_mean: n for n, l in named_modules(model).items() if l in bn_layers(model)})


def check(model, batches, told=None, **kwargs):
    "In step and one layer at a time give the same, and only what is `told` is warned of; returns the number of calls of the model"
    reference = deepcopy(model)
    want, n = observe(reference, batches, team(reference), progress=False)
    calls = []
    handle = model.register_forward_pre_hook(lambda m, a: calls.append(1))
    before = bits(model.state_dict().values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found, count = observe_in_step(model, batches, team(model), progress=False, **kwargs)
    handle.remove()
    said = [str(w.message) for w in caught if "method='sequential'" in str(w.message)]
    assert len(said) == (told is not None) and (told is None or told in said[0]), said
    assert count == n and found.keys() == want.keys() and same(before, model.state_dict().values())
    for name, m in want.items():
        assert (found[name].n, found[name].dof) == (m.n, m.dof)
        torch.testing.assert_close(found[name].mean, m.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name].m2, m.m2, rtol=1e-5, atol=1e-5 * m.n)
    return len(calls)


def test_one_pass():
    assert check(net(), images()) == 3 + 2


@pytest.mark.parametrize('arch', [resnet18, mobilenet_v2, pytest.param(densenet121, marks=pytest.mark.long)])
def test_networks(arch):
    torch.manual_seed(0)
    assert check(arch(num_classes=2), images((3, 3, 2), 32)) == 3 + 2


@pytest.mark.parametrize('max_mem', [0, 20_000, 40_000, 60_000, 80_000, 1e9])
def test_whatever_the_memory(max_mem):
    model = nn.Sequential(*net(2), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    check(model, images(), max_mem=max_mem)


def test_batches_are_kept_within_the_memory():
    assert check(net(), images((6,) * 9), max_mem=0) == 1 + 3 * 9
    sized = type('Short', (list,), dict(__len__=lambda self: 1))(images((6,) * 9))  # tells a wrong length
    check(net(), sized, max_mem=40_000, told='more batches')


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.other, self.conv = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.other(self.conv(self.bn(self.conv(self.other(self.bn(x))))))


def test_layers_that_are_called_several_times():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), Shared(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert check(model, images()) == 3 + 2 + 2 * 3


class Branches(nn.Module):
    "Takes its layers in an order that `choose` gives for each batch"

    def __init__(self, choose):
        super().__init__()
        self.layers, self.choose = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)]), choose

    def forward(self, x):
        for i in self.choose(len(x)):
            x = self.layers[i](x)
        return x


@pytest.mark.parametrize(
    'choose,told',
    [
        (lambda n: [0, 1, 2] if n != 3 else [0, 2, 1], 'batch 3 reaches the layer'),
        (lambda n: [0, 1, 2] if n != 3 else [0, 0, 1, 2], 'batch 3 reaches the layer'),
        (lambda n: [0, 1] if n != 3 else [0, 1, 2], 'batch 3 reaches the layer'),
        (lambda n: [0, 1, 2] if n != 3 else [0, 2], None),
        (lambda n: [0, 1, 2] if n != 3 else [], None),
    ],
)
def test_batches_that_go_other_ways(choose, told):
    torch.manual_seed(0)
    check(Branches(choose), images((6, 6, 3)), told)
    if told:
        with pytest.raises(ValueError, match=f'{told}.*DataLoader'):
            recalibrate_bn(Branches(choose), iter(images((6, 6, 3))), method='sequential', progress=False)


@pytest.mark.parametrize('sizes', [(6, 6, 3), (6,)])
@pytest.mark.parametrize('max_mem', [None, 0])
@pytest.mark.parametrize(
    'choose,told',
    [
        (lambda n: [0, 1] if n == 2 else [0], "no batch reaches the layer 'layers.1.1' as the first samples do"),
        (lambda n: [0, 2, 1] if n == 2 else [0, 1, 2], 'the first samples do'),
    ],
)
def test_first_samples_that_go_another_way_than_all_batches(choose, told, max_mem, sizes):
    torch.manual_seed(0)
    check(Branches(choose), images(sizes), told, max_mem=max_mem)


class KeepsOnItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = net(2), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.hook = hook_output(self.down[2], detach=False)

    def forward(self, x):
        return self.up(self.down(x) + self.hook.stored)


@pytest.mark.parametrize('sizes', [(6, 6, 6), (6, 6, 2)])
def test_models_that_keep_something_on_themselves(sizes):
    "As fastai's U-Net does: a batch that waits finds there what another one left"
    check(KeepsOnItself(), images(sizes), 'keeps something' if len({*sizes}) == 1 else 'raised RuntimeError')


class KeepsBySize(nn.Module):
    "Batches of the same size overwrite what the others left"

    def __init__(self):
        super().__init__()
        self.down, self.up, self.kept = nn.BatchNorm2d(3), nn.BatchNorm2d(3), {}

    def forward(self, x):
        self.kept[len(x)] = x
        return self.up(self.down(x) * self.kept[len(x)])


def test_models_that_keep_something_for_each_size():
    check(KeepsBySize(), images((6, 6, 6)), 'keeps something')


class InThread(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.bn, self.conv, self.f = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), f
        self.after = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.after(self.f(self.conv, self.bn(x)))


def with_grad(conv, x):
    with torch.enable_grad():
        y = conv(x)
        assert y.requires_grad
    return y.detach()


class GradientOf(nn.Module):
    "Layers inside of what is differentiated, and one that is given the gradient"

    def __init__(self):
        super().__init__()
        self.inner, self.after = net(2), nn.BatchNorm2d(3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.inner(x)
            assert torch.is_grad_enabled() and y.requires_grad
            y = torch.autograd.grad(y.square().sum(), x)[0]
        return self.after(y)


@pytest.mark.parametrize('max_mem,calls', [(None, 3 + 2), (0, 1 + 3 * 3)])
def test_gradients_inside_of_a_model(max_mem, calls):
    assert check(GradientOf(), images(), max_mem=max_mem) == calls
    assert torch.is_grad_enabled()


def in_half(conv, x):
    with torch.autocast('cpu', torch.bfloat16):
        y = conv(x)
        assert y.dtype == torch.bfloat16
    return y.float()


@pytest.mark.parametrize(
    'f', [with_grad, in_half, lambda conv, x: checkpoint(conv, x, use_reentrant=False), lambda conv, x: torch.zeros(3, 8, 8) + conv(x)]
)
def test_what_a_model_sets_for_its_thread(f):
    check(InThread(f), images())


def test_what_is_set_outside_holds_inside():
    model = InThread(lambda conv, x: (seen.append((conv(x).dtype, torch.is_grad_enabled())), x)[1])
    seen = []
    with torch.autocast('cpu', torch.bfloat16):
        check(model, images())
    assert {*seen} == {(torch.bfloat16, False)}


def test_modes_of_the_caller_hold_inside():
    class Notes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen = getattr(self, 'seen', set()) | {func}
            return func(*args, **(kwargs or {}))

    with Notes() as notes:
        recalibrate_bn(InThread(lambda conv, x: F.silu(x)), images(), method='sequential', progress=False)
    assert F.silu in notes.seen


def test_held_layers():
    model = net()
    set_bn_mode(model, 'frozen')
    recalibrate_bn(model.train(), images(), method='sequential', progress=False)
    recalibrate_bn(plain := net(), images(), method='sequential', progress=False)
    assert {bn_mode(l) for l in bn_layers(model)} == {'frozen'} and same(list(plain.buffers()), list(model.buffers()))


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('call', [1, 2, 4, 5])
def test_a_model_that_raises(error, call):
    "On the look, or in any batch at any time"
    model, calls = net(), []
    before = bits(model.state_dict().values())

    def raises(m, args):
        calls.append(1)
        if len(calls) >= call:
            raise error('here')

    model[4].register_forward_pre_hook(raises)
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        recalibrate_bn(model, images(), method='sequential', progress=False)
    assert same(before, model.state_dict().values()) and len(calls) >= call


def test_a_model_that_catches_everything():
    def stubborn(conv, x):
        try:
            return conv(x)
        except BaseException:
            return x

    model = InThread(stubborn)
    model.after.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(KeyboardInterrupt()) if threading.active_count() > 3 else None)
    with pytest.raises(KeyboardInterrupt):
        recalibrate_bn(model, images(), method='sequential', progress=False)


@on_linux
@pytest.mark.parametrize('where', ['in a call', 'between calls'])
def test_ctrl_c(where):
    "A signal, while the model computes or a thread is in Python"
    model, batches = net(), images((6,) * 9)
    before, seen = bits(model.state_dict().values()), []

    def interrupts(m, args):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT) if where == 'between calls' else signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(0.05)

    old = {
        s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGALRM, signal.SIGINT)
    }  # a job in the background ignores SIGINT
    model[3].register_forward_pre_hook(interrupts)
    try:
        with pytest.raises(KeyboardInterrupt):
            recalibrate_bn(model, batches, method='sequential', progress=False)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
    assert same(before, model.state_dict().values()) and torch.is_grad_enabled() and model.training


def test_many_batches(monkeypatch):
    assert check(net(), images((2,) * 100, 4)) == 102
    monkeypatch.setattr('bnfreeze_fastai.stats.look.MAX_WALKS', 10)
    assert check(net(), images((2,) * 11, 4)) == 1 + 3 * 11


def test_iterators_of_any_length():
    model, plain = net(), net()
    recalibrate_bn(model, (x for x in images()), method='sequential', progress=False)
    recalibrate_bn(plain, images(), method='sequential', progress=False)
    assert same(list(plain.buffers()), list(model.buffers()))
    with pytest.raises(ValueError, match='loader yields nothing'):
        recalibrate_bn(model, iter([]), method='sequential', progress=False)
