"Why statistics are stale: a fact only where the stored values show it, otherwise what can be, the likeliest first"

import pytest, torch
from torch import nn

from bnfreeze_fastai.health.stale import Hints, why_stale
from bnfreeze_fastai.stats.moments import batch_moments
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn


def batches(n, scale=1.0, offset=4.0):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 3, generator=g) * 2 + offset) * scale for _ in range(n)]


def after(n, momentum):
    layer = nn.BatchNorm1d(3, momentum=momentum)
    for x in batches(n):
        layer(x)
    return layer


def why(layer, scale=1.0, **kwargs):
    return why_stale({'a': layer}, Hints({'a': batch_moments(torch.cat(batches(8, scale)))}, **kwargs))[0]


@pytest.mark.parametrize('n,momentum', [(10, 0.01), (60, 0.001), (1, 0.1)])
def test_first_values_that_still_weigh_are_a_fact(n, momentum):
    assert why(after(n, momentum)) == (
        f'The momentum is too low for so few batches: the first values still weigh {(1 - momentum) ** n:.0%}.'
    )


@pytest.mark.parametrize('n', [1, 2, 5, 10])
@pytest.mark.parametrize('scale', [1.0, 3.0])
def test_recalibrated_statistics_are_not_the_first_values(n, scale):
    "`num_batches_tracked` counts a few batches, but what was there before weighs nothing"
    layer = nn.BatchNorm1d(3)
    recalibrate_bn(nn.Sequential(layer), batches(n), progress=False)
    said = why(layer, scale)
    assert said.startswith('What can be behind it') and 'the data are not those' in said
    if scale == 1:
        assert 'first values' not in said


def test_the_order_of_what_can_be():
    slow = after(600, 0.01)
    said = why(slow, averaging='MyEma', dropped=['a', 'elsewhere'])
    words = ('`MyEma` averages the weights', 'reaches back over about 100', 'dropout on before a,', 'the data are not those')
    at = [said.index(word) for word in words]
    assert at == sorted(at) and 'elsewhere' not in said
    assert 'MyEma' not in why(slow) and 'dropout' not in why(slow) and 'EMA, SWA' in why(slow)
    assert 'of the last batch or two' in why(after(60, 0.9))


@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.SyncBatchNorm, lambda n: nn.InstanceNorm1d(n, track_running_stats=True)])
@pytest.mark.parametrize('momentum', [0.1, None, 0.0])
def test_layers_of_every_kind(norm, momentum):
    layer = norm(3)
    layer.momentum = momentum
    layer.running_mean += 1
    layer.num_batches_tracked += 5
    assert why_stale({'a': layer})[1].startswith('Re-estimate them')
