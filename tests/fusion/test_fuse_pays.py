"Layers too small for fusion to pay run as they do without it, and the others are fused beside them"

from contextlib import nullcontext

import pytest, torch
from learners import make_learner
from test_fuse import Checkpointed, furthest, prepare, run
from torch import nn
from torchvision import models

from bnfreeze_fastai.fusion import fuse, lazy
from bnfreeze_fastai.fusion.convolution import MIN_VALUES, pays
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes

pytestmark = pytest.mark.filterwarnings('ignore')  # statistics that were never trained


def images(n, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def large_and_small():
    "For 6 images of 32 pixels: 98,304 values of output for 432 weights, then 18,432 for 6,912, then 98,304 for 3,072"
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 48, 3, padding=1, stride=4), nn.ConvTranspose2d(48, 16, 4, 4, groups=4)]
    layers = [l for conv in convs for l in (conv, nn.BatchNorm2d(conv.out_channels), nn.Tanh())]
    return prepare(nn.Sequential(*layers), images(6))


def test_a_small_layer_is_not_deferred_and_costs_one_look(monkeypatch):
    calls, model, x = [], large_and_small(), images(6)
    monkeypatch.setattr(fuse, 'defer', lambda uses, *args: (calls.append(args[2]), lazy.defer(uses, *args))[1])
    types = []
    model[4].register_forward_pre_hook(lambda m, args: types.append(type(args[0])))
    with fused_bn(model) as fusion:
        for _ in range(3):
            run(model, x)
    assert types == [torch.Tensor] * 3
    assert [sum(w is conv.weight for w in calls) for conv in model[::3]] == [3, 1, 3]
    assert fusion.pairs.values.tolist() == [['0', '1'], ['6', '7']]


def test_where_nothing_pays_all_is_bitwise_as_without():
    model, x = large_and_small(), images(2)
    plain = run(model, x)
    with fused_bn(model) as fusion:
        for _ in range(2):
            found = run(model, x)
            assert found.keys() == plain.keys() and all(torch.equal(found[k], plain[k]) for k in plain)
    assert fusion.pairs.empty


def test_a_smaller_last_batch_goes_its_own_way():
    model = large_and_small().double()
    batches = [images(n).double() for n in (6, 2, 6, 60, 2)]
    exact = [run(model, x) for x in batches]
    with fused_bn(model) as fusion:
        for i, x in enumerate(batches):
            assert furthest(run(model, x), exact[i]) < 1e-10
            assert len(fusion.pairs) == (3 if i > 2 else 2)


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_repeats_what_was_decided(reentrant):
    model = prepare(Checkpointed(reentrant, large_and_small()), images(6)).double()
    for n in (6, 2):
        x = images(n).double()
        exact = run(model, x)
        with fused_bn(model) as fusion:
            for _ in range(2):
                assert furthest(run(model, x), exact) < 1e-10
        assert len(fusion.pairs) == (2 if n == 6 else 0)


def test_a_second_backward_pass_through_the_same_graph():
    model, x = large_and_small(), images(6)
    with fused_bn(model):
        out = model(x).sum()
        first = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        second = torch.autograd.grad(out, list(model.parameters()))
    assert all(map(torch.equal, first, second))


def test_what_is_not_saved_is_little_more_than_the_kernel_of_each_layer(monkeypatch):
    torch.manual_seed(0)
    model, x = models.resnet18(), images(4, 64)
    model.eval()
    kept = {}
    for name, at_any_size in (('fused', False), ('all fused', True)):
        with fused_bn(model), monkeypatch.context() as patched:
            patched.setattr(lazy, 'pays', (lambda *_: True) if at_any_size else pays)
            kept[name] = kept_bytes(model, x)
    most = sum(4 * (10 / 9 * m.weight.numel() + MIN_VALUES) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert kept['all fused'] < kept['fused'] < kept['all fused'] + most


@pytest.mark.parametrize('size, told', [(8, True), (96, False)])
def test_a_learner_is_told_when_nothing_pays(size, told):
    learn = make_learner(size=size).freeze_to_bn(0, bn_above='affine-only').fuse_bn()
    with pytest.warns(UserWarning, match='nothing to fuse: it would take more time.*batches or images') if told else nullcontext():
        learn.fit(1)
    assert learn.batch_norm_fuse.pairs.empty == told
