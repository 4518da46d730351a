"`set_bn_momentum`: what torch then does is what the half-life says, for every kind of layer, and it is undone"

from copy import deepcopy
from functools import partial
from math import inf

import numpy as np, pytest, torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.core import bn_mode, hold_bn_mode, set_bn_mode
from bnfreeze_fastai.stats.momentum import momentum_of, set_bn_momentum, share_left, steps_until

INSTANCE = partial(nn.InstanceNorm2d, track_running_stats=True)
LAYERS = {
    '1d': (nn.BatchNorm1d, (5, 3)),
    '2d': (nn.BatchNorm2d, (5, 3, 2, 2)),
    '3d': (nn.BatchNorm3d, (5, 3, 2, 2, 2)),
    'no affine': (partial(nn.BatchNorm2d, affine=False), (5, 3, 2, 2)),
    'timm': (BatchNormAct2d, (5, 3, 2, 2)),
    'instance': (INSTANCE, (5, 3, 2, 2)),
}


def moved_by_zeros(layer, shape, steps):
    "What is left of a running mean of 1 after batches of zeros"
    layer.train().running_mean.fill_(1.0)
    for _ in range(steps):
        layer(torch.zeros(shape))
    return layer.running_mean[0].item()


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('half_life', [0.3, 1, 7, 7.5, np.float32(20), 10**6])
def test_half_is_left_after_the_half_life(kind, half_life):
    make, shape = LAYERS[kind]
    set_bn_momentum(layer := make(3), half_life)
    left = moved_by_zeros(layer, shape, 14)
    assert left == pytest.approx(0.5 ** (14 / half_life), abs=1e-5) == pytest.approx(share_left(layer, 14), abs=1e-5)


@pytest.mark.parametrize('kind', [k for k in LAYERS if k != 'instance'])
@pytest.mark.parametrize('before', [0, 6])
def test_without_half_life_all_batches_count_alike(kind, before):
    make, shape = LAYERS[kind]
    set_bn_momentum(layer := make(3), None)
    layer.num_batches_tracked.fill_(before)
    expected = share_left(layer, 4)
    assert moved_by_zeros(layer, shape, 4) == pytest.approx(expected, abs=1e-6) == pytest.approx(before / (before + 4), abs=1e-6)


def test_instance_norm_has_no_cumulative_average():
    layer = INSTANCE(3, momentum=None)
    assert moved_by_zeros(layer, (5, 3, 2, 2), 3) == 1 == share_left(layer, 3) and steps_until(layer, 0.05) == inf
    model = nn.Sequential(INSTANCE(3), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"\['0'\] are instance norm.*Give a half-life"):
        set_bn_momentum(model, None)
    assert [l.momentum for l in model] == [0.1, 0.1]
    set_bn_momentum(model, None, layers='1')
    assert [l.momentum for l in model] == [0.1, None]


@pytest.mark.parametrize('momentum', [1e-4, 0.01, 0.1, 0.5, 0.99, None])
def test_steps_are_the_first_after_which_so_little_is_left(momentum):
    layer = nn.BatchNorm2d(3, momentum=momentum)
    layer.num_batches_tracked.fill_(17)
    steps = steps_until(layer, 0.05)
    assert share_left(layer, steps) <= 0.05 and (steps == 1 or share_left(layer, steps - 1) > 0.05)


@pytest.mark.parametrize('momentum,steps', [(0.0, inf), (1.0, 1)])
def test_momentum_at_its_ends(momentum, steps):
    assert steps_until(nn.BatchNorm2d(3, momentum=momentum), 0.05) == steps


@pytest.mark.parametrize('bad', [0, -1, float('nan'), inf, 10**400, True, '20', torch.tensor(20.0), [20]])
def test_bad_half_lives_change_nothing(bad):
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match='`half_life` has to be a number of training steps above 0'):
        set_bn_momentum(model, bad)
    assert model[0].momentum == 0.1


@pytest.mark.parametrize(
    'model,layers,said',
    [
        (nn.Sequential(nn.BatchNorm2d(3)), 'head.*', 'matches no norm layer'),
        (nn.Sequential(nn.BatchNorm2d(3)), None, '`layers` has to be a glob'),
        (nn.Sequential(nn.GroupNorm(1, 3)), '*', 'keeps running statistics'),
        (nn.Sequential(FrozenBatchNorm2d(3)), '*', 'keeps running statistics'),
        (nn.Linear(3, 3), '*', 'keeps running statistics'),
        ('model', '*', 'Expected a model'),
    ],
)
def test_models_without_such_layers(model, layers, said):
    with pytest.raises(ValueError, match=said):
        set_bn_momentum(model, 20, layers)


def test_layers_without_momentum_are_left_out():
    model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    assert [*set_bn_momentum(model, 1)] == ['0'] and model[0].momentum == 0.5
    assert model[2].momentum == 0.1 and not hasattr(model[1], 'momentum')


def test_wrapped_and_nested_blocks_give_back_what_was_there():
    model = nn.DataParallel(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)))
    momenta = lambda: [l.momentum for l in model.module]
    with pytest.raises(KeyboardInterrupt):
        with set_bn_momentum(model, 1):
            with set_bn_momentum(model, 2, layers='0') as inner:
                assert inner == {'0': 0.5} and momenta() == [momentum_of(2), 0.5]
            assert momenta() == [0.5, 0.5]
            raise KeyboardInterrupt
    assert momenta() == [0.1, None]


def test_what_it_returns_is_shown_in_a_line():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None))
    assert repr(set_bn_momentum(model, 5)) == 'Momentum before: 0.1 in 2 layers, none (cumulative) in 1 layer'
    assert set_bn_momentum(deepcopy(model), 5) == dict.fromkeys('012', momentum_of(5))


@pytest.mark.parametrize('start', [0.1, None])
@pytest.mark.parametrize('half_life', [5, None])
def test_a_mode_set_for_good_goes_on_holding(start, half_life):
    "A hold takes `momentum=None` for the work of `update_bn`, if it knows another momentum"
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=start))
    model(torch.randn(4, 3, 2, 2))
    set_bn_mode(model, 'affine-only')
    mean = model[0].running_mean.clone()
    with set_bn_momentum(model, half_life):
        model.train()(torch.randn(4, 3, 2, 2))
        assert torch.equal(model[0].running_mean, mean) and bn_mode(model[0]) == 'affine-only'
    model.train()(torch.randn(4, 3, 2, 2))
    assert torch.equal(model[0].running_mean, mean) and bn_mode(model[0]) == 'affine-only' and model[0].momentum == start


def test_update_bn_works_on_a_held_layer_with_another_momentum():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model(torch.randn(4, 3, 2, 2))
    set_bn_mode(model, 'affine-only')
    set_bn_momentum(model, 7)
    x = torch.randn(4, 3, 2, 2) + 5
    update_bn([x], model)
    assert torch.allclose(model[0].running_mean, x.mean((0, 2, 3)), atol=1e-5) and model[0].momentum == momentum_of(7)


def test_inside_a_block_that_holds_a_mode():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model(torch.randn(4, 3, 2, 2))
    mean = model[0].running_mean.clone()
    with hold_bn_mode(model, 'frozen'):
        set_bn_momentum(model, 3)
        model.train()(torch.randn(4, 3, 2, 2))
    assert torch.equal(model[0].running_mean, mean) and model[0].momentum == momentum_of(3)
