"Re-estimation, stored features, folding and fusion on the device that `--device` names, beside the CPU"

from contextlib import nullcontext

import pytest, torch
from fastai.torch_core import set_seed
from heads import StepLosses, dropout_head
from learners import body_and_head, make_learner, pretrained
from torch import nn

from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

pytestmark = pytest.mark.cuda


def network(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4))
    return model.to(device)


def batches(device):
    g = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(n, 3, 10, 10, generator=g) + 2).to(device) for n in (8, 5)]


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_statistics_are_those_of_double_precision(device, method, memory_format):
    found = []
    for where, dtype in (('cpu', torch.float64), (device, torch.float32)):
        model = network(where).to(dtype=dtype, memory_format=memory_format)
        data = [x.to(dtype=dtype, memory_format=memory_format) for x in batches(where)]
        recalibrate_bn(model, data, method=method, progress=False)
        found.append([b.cpu().double() for b in model.buffers()])
    for exact, own in zip(*found):
        torch.testing.assert_close(own, exact, rtol=2e-3, atol=2e-3)  # convolutions may round to TF32


def test_statistics_in_autocast_and_on_a_stream_of_ones_own(gpu):
    plain, model = network(gpu), network(gpu)
    recalibrate_bn(plain, batches(gpu), method='sequential', progress=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        data = batches(gpu)
        torch.cuda._sleep(10**8)  # what other streams do, is done before this
        late = [x.mul_(2).div_(2) for x in data]
        recalibrate_bn(model, late, method='sequential', progress=False)
    torch.cuda.synchronize()
    for a, b in zip(plain.buffers(), model.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.autocast('cuda', dtype=torch.float16):
        recalibrate_bn(model, batches(gpu), progress=False)
    assert all(b.isfinite().all() for b in model.buffers())


def frozen_learner(device):
    set_seed(0)
    learn = make_learner(model=nn.Sequential(body_and_head()[0], dropout_head()), device=device, lr=1e-2)
    learn.fit(1)
    return learn.freeze_to_bn(-1)


def losses(learn):
    set_seed(1)
    seen = StepLosses()
    learn.fit(2, cbs=seen)
    return torch.tensor(seen.seen)


@pytest.mark.parametrize('method', ['precompute', 'fold_frozen'])
def test_the_head_has_the_same_losses(device, method):
    plain, learn = losses(frozen_learner(device)), frozen_learner(device)
    with getattr(learn, method)():
        torch.testing.assert_close(losses(learn), plain, rtol=1e-3 if device == 'cpu' else 2e-2, atol=1e-4)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_fused_gradients_are_those_of_two_layers(device, dtype, memory_format):
    def gradients(fused):
        model = pretrained(device=device).model.to(device, memory_format=memory_format).train()
        x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(device, memory_format=memory_format)
        autocast = nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)
        with hold_bn_mode(model, 'affine-only'), fused_bn(model) if fused else nullcontext(), autocast:
            out = model(x)
        out.float().square().mean().backward()
        return [p.grad.float() for p in model.parameters()]

    for a, b in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(b, a, rtol=5e-2 if dtype else 1e-2, atol=(5e-2 if dtype else 1e-3) * a.abs().max().item() + 1e-6)
