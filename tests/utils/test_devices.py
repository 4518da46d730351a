"What is asked of a device that has no double precision, and of one that is not Nvidia's"

import threading
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest, torch
from fastai.torch_core import set_seed
from learners import body_and_head, make_learner
from no_float64 import on_it, Pretended, REFUSAL
from torch import nn, Tensor
from torch.overrides import TorchFunctionMode

import bnfreeze_fastai.learner
from bnfreeze_fastai.head.drawing import Undrawn
from bnfreeze_fastai.head.fold import _check_folded, folded
from bnfreeze_fastai.head.resume import _refuse_differing
from bnfreeze_fastai.layers import norm_layers
from bnfreeze_fastai.stats.distances import bn_drift, moved, snapshot
from bnfreeze_fastai.stats.observe import ByBatch, observe
from bnfreeze_fastai.stats.recalibrate import convert_bn, recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift
from bnfreeze_fastai.stats.turns import InTurns
from bnfreeze_fastai.utils import devices
from bnfreeze_fastai.utils.devices import device_rng, free_memory, used_devices
from bnfreeze_fastai.utils.restore import evaluating, kept_rng
from bnfreeze_fastai.utils.tensors import fingerprint


@pytest.fixture
def pretended(monkeypatch):
    "Tensors of the CPU can be sent to that device"
    real = Tensor.to

    def to(self, *args, **kwargs):
        there = isinstance(self, Pretended) or not any(str(o).startswith('mps') for o in (*args, kwargs.get('device')))
        return real(self, *args, **kwargs) if there else on_it(self)

    monkeypatch.setattr(Tensor, 'to', to)
    return on_it


def network():
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.BatchNorm1d(4)
    convs = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(convs, nn.Sequential(nn.Flatten(), norms[2], nn.Linear(4, 2)))


def batches():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=g) for n in (4, 4, 3)]


def test_the_pretended_device_refuses(pretended):
    x = pretended(torch.ones(2))
    assert x.device.type == 'mps' and type(x.cpu()) is Tensor and (x + 1).device.type == 'mps'
    for wrong in (Tensor.double, lambda t: t.to('cpu', torch.float64), lambda t: t.to(torch.float64), lambda t: t.sum(dtype=torch.float64)):
        with pytest.raises(TypeError, match=REFUSAL[:30]):
            wrong(x)
    with pytest.raises(TypeError, match=REFUSAL[:30]):
        torch.ones(2).double().to(x.device)
    with pytest.raises(RuntimeError, match='same device'):
        x + torch.ones(2)


@pytest.mark.parametrize('how', [dict(), dict(method='sequential'), dict(preserve=True), dict(method='sequential', preserve=True)], ids=str)
def test_recalibration_gives_what_it_gives_on_the_cpu(pretended, how):
    here, there = network(), pretended(network())
    recalibrate_bn(here, batches(), progress=False, **how)
    recalibrate_bn(there, [pretended(x) for x in batches()], progress=False, **how)
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values()):
        assert b.device.type == 'mps', name
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-6, msg=name)


def test_a_block_puts_statistics_back_there(pretended):
    model = pretended(network())
    before = [fingerprint(b) for b in model.buffers()]
    with recalibrate_bn(model, [pretended(x) for x in batches()], progress=False):
        assert [fingerprint(b) for b in model.buffers()] != before
    assert [fingerprint(b) for b in model.buffers()] == before


def test_distances_are_those_of_the_cpu(pretended):
    here, there = network(), pretended(network())
    on_device = [pretended(x) for x in batches()]
    a, b = bn_shift(here, batches(), progress=False), bn_shift(there, on_device, progress=False)
    torch.testing.assert_close(torch.tensor(b['kl']), torch.tensor(a['kl']), rtol=1e-4, atol=1e-6)
    start = snapshot(there)
    assert {t.dtype for tensors in start.values() for k, t in tensors.items() if k != "num_batches_tracked"} == {torch.float64}
    convert_bn(there, on_device, progress=False)
    assert (bn_drift(there, start)['kl'] > 0).all() and (moved(there, start)['affine_moved'] > 0).all()


def test_a_learner_trains_there_as_on_the_cpu(pretended):
    "With its frozen part verified, statistics measured in the middle, and all of it in the summary"
    found = []
    for send in (lambda model: model, pretended):
        set_seed(0)
        learn = make_learner(model=send(body_and_head()))
        learn.dls.device = 'cpu' if not found else 'mps'
        learn.fit(1)
        learn.freeze_to_bn(-1)
        learn.recalibrate_bn(method='sequential')
        frozen = [fingerprint(t) for t in learn.model[0].state_dict().values()]
        set_seed(1)
        learn.fit(2)
        assert [fingerprint(t) for t in learn.model[0].state_dict().values()] == frozen
        assert set(learn.bn_summary().df['mode']) == {'frozen', 'train'}
        found.append(torch.cat([t.detach().cpu().flatten() for t in learn.model.parameters()]))
    assert next(learn.model.parameters()).device.type == 'mps'
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_folded_copy_is_checked_on_the_cpu(pretended, monkeypatch):
    monkeypatch.setattr(torch.__future__, '_overwrite_module_params_on_conversion', True)  # `.data` cannot go to the CPU
    model, x = pretended(network()[0]), pretended(batches()[0])
    with torch.no_grad():
        copy = folded([model], x)
        _check_folded(copy, [model], x)
        assert [b.device.type for b in model.buffers()] == ['mps'] * 6  # what was checked in double precision is a copy
        next(copy.parameters()).mul_(1.01)  # less than TF32 may do
        with pytest.raises(ValueError, match='off by'):
            _check_folded(copy, [model], x)


def test_what_a_gpu_rounds_is_not_taken_for_another_network(pretended, monkeypatch):
    "TF32, which only one of two kernels may use"
    monkeypatch.setattr(torch.__future__, '_overwrite_module_params_on_conversion', True)
    model, x = pretended(network()[0]), pretended(batches()[0])
    with torch.no_grad():
        copy = folded([model], x)
        rounding = copy.register_forward_hook(lambda m, args, out: out * (1 + 1e-3) if out.dtype == torch.float32 else None)
        _check_folded(copy, [model], x)
        rounding.remove()
        copy.register_forward_hook(lambda m, args, out: out * 1.1 if out.dtype == torch.float32 else None)
        with pytest.raises(ValueError, match='off by'):
            _check_folded(copy, [model], x)


def test_features_differ_by_rounding(pretended):
    features = torch.randn(4, 8)
    off = features * (1 + 5e-3)
    with pytest.raises(ValueError, match='differs by'):
        _refuse_differing(features, off)
    _refuse_differing(pretended(features), pretended(off))
    with pytest.raises(ValueError, match='differs by'):
        _refuse_differing(pretended(features), pretended(features * 1.1))


class Transfers(TorchFunctionMode):
    "Counts copies from that device to the CPU"

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        res = func(*args, **kwargs or {})
        self.count += func.__name__ in ('cpu', 'to') and isinstance(args[0], Pretended) and not isinstance(res, Pretended)
        return res


def test_a_batch_is_measured_in_one_transfer(pretended):
    model, data = pretended(network().eval()), [pretended(x) for x in batches()]
    names = {l.running_mean: n for n, l in norm_layers(model).items()}
    with Transfers() as seen:
        found, n = observe(model, data, ByBatch(names), progress=False)
    assert seen.count == n == len(data) and len(found) == 3


def test_evaluation_puts_back_buffers_there(pretended):
    model = pretended(network())
    before = [fingerprint(b) for b in model.buffers()]
    with evaluating(model):
        next(model.buffers()).add_(1)
    assert [fingerprint(b) for b in model.buffers()] == before


KINDS = {
    'mps': ('torch.backends.mps.is_available', 'torch.mps'),
    'xpu': ('torch.xpu.is_initialized', 'torch.xpu'),
    'cuda': ('torch.cuda.is_initialized', 'torch.cuda'),
}


@pytest.fixture(params=KINDS)
def generators(request, monkeypatch):
    "Two devices of a kind (one of Apple's), whose random numbers come from generators of the CPU"
    if torch.cuda.is_available():
        pytest.skip('there is a real one')
    in_use, module = KINDS[request.param]
    found = [torch.Generator() for _ in range(1 if request.param == 'mps' else 2)]
    monkeypatch.setattr(in_use, lambda: True)
    if request.param != 'mps':
        monkeypatch.setattr(f'{module}.device_count', lambda: len(found))
    monkeypatch.setattr(f'{module}.get_rng_state', lambda i: found[i].get_state())
    monkeypatch.setattr(f'{module}.set_rng_state', lambda state, i: found[i].set_state(state))
    return found


def test_random_numbers_of_every_device_are_kept(generators):
    draw = lambda: [torch.rand(1, generator=g).item() for g in generators] + [torch.rand(1).item()]
    with kept_rng():
        first = draw()
        with pytest.raises(KeyboardInterrupt), kept_rng():
            draw()
            raise KeyboardInterrupt
        second = draw()
    assert draw() == first and draw() == second and first != second


def test_a_draw_on_any_device_is_seen(generators):
    for g in generators:
        with pytest.raises(ValueError, match='draws random numbers'):
            Undrawn(lambda: torch.rand(1, generator=g), ['it'], 'training')()
    assert Undrawn(lambda: 3, ['it'], 'training')() == 3


def test_nothing_is_asked_of_a_device_that_is_not_in_use(monkeypatch):
    fail = lambda *args: pytest.fail('started')
    for k in ('torch.cuda.device_count', 'torch.xpu.device_count', 'torch.cuda.get_rng_state', 'torch.xpu.get_rng_state'):
        monkeypatch.setattr(k, fail)
    for k, (in_use, _) in KINDS.items():
        monkeypatch.setattr(in_use, lambda: False)
    assert used_devices() == {} and device_rng() == []


@pytest.mark.parametrize('kind', KINDS)
def test_a_thread_computes_as_the_one_that_made_it(kind, monkeypatch):
    "Autocast of any kind of device, and the device and the stream that are current"
    if not torch.amp.is_autocast_available(kind):
        pytest.skip(f'PyTorch {torch.__version__} has no autocast on {kind}')
    monkeypatch.setattr('bnfreeze_fastai.stats.turns.used_devices', lambda: {kind: [0, 1]})
    chosen = []

    @contextmanager
    def stream(s):
        chosen.append((s, threading.current_thread() is threading.main_thread()))
        yield

    if kind != 'mps':
        monkeypatch.setattr(f'torch.{kind}.current_stream', lambda: 'a stream of device 1')
        monkeypatch.setattr(f'torch.{kind}.stream', stream)
    seen = []
    torch.set_autocast_enabled(kind, True)
    try:
        turns = InTurns(lambda: seen.append(torch.is_autocast_enabled(kind)), by_main=False)
        monkeypatch.setattr(torch, 'autocast', lambda d, dtype, on: torch.amp.autocast('cpu', enabled=False) if d == 'cpu' else on_(d, on))
        turns.go_on()
    finally:
        torch.set_autocast_enabled(kind, False)
        turns.stop()
    assert seen == [True] and chosen == ([] if kind == 'mps' else [('a stream of device 1', False)])


class on_:
    "Autocast without its check that there is such a device"

    def __init__(self, device, on):
        self.device, self.on = device, on

    def __enter__(self):
        torch.set_autocast_enabled(self.device, self.on)

    def __exit__(self, *error):
        torch.set_autocast_enabled(self.device, False)


@pytest.mark.parametrize('version', [1, 2])
def test_a_container_has_less_than_the_machine(monkeypatch, version):
    limit, used, parts = devices._FILES[2 - version]
    monkeypatch.setattr(devices, '_CGROUP', Path())
    for name, text in ((limit, '3000'), (used, '2000'), (parts, 'anon 900\ninactive_file 500\nactive_file 9\n')):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert free_memory('cpu') == 1500
    Path(limit).write_text('max')
    assert free_memory('cpu') > 2**20


def test_a_device_without_autocast(monkeypatch):
    "That of Apple's GPUs came after PyTorch 2.4"
    generator, known = torch.Generator(), torch.amp.is_autocast_available
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda device: generator.get_state())
    monkeypatch.setattr(torch.mps, 'set_rng_state', lambda state, device: generator.set_state(state))
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda kind: kind != 'mps' and known(kind))
    monkeypatch.setattr(torch, 'get_autocast_dtype', lambda kind: {'cpu': torch.bfloat16}[kind])
    model = network().eval()
    recalibrate_bn(model, batches(), method='sequential', progress=False)


def test_free_memory_of_other_kinds_is_that_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.xpu, 'mem_get_info', lambda device: (7, 9), raising=False)  # not in PyTorch 2.4
    assert free_memory('xpu') == 7
    assert free_memory('mps') > 2**20 < free_memory(torch.device('meta'))
