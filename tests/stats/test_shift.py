"A summary of `bn_shift` that a few channels cannot rule"

import pickle
from copy import deepcopy

import pandas as pd, pytest, torch
from fastai.torch_core import set_seed
from learners import make_learner
from torch import nn

from bnfreeze_fastai.stats.distances import bn_drift, snapshot, symmetric_kl
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift

COLUMNS = ['layer', 'mean_shift', 'log_var_ratio', 'kl', 'kl_median', 'dead']


def net(n=3, channels=8):
    set_seed(0)
    layers = [l for i in range(n) for l in (nn.Conv2d(channels if i else 3, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())]
    model = nn.Sequential(*layers)
    recalibrate_bn(model, images(), method='sequential', progress=False)
    return model


def images(scale=1.0):
    g = torch.Generator().manual_seed(0)
    return [scale * torch.randn(8, 3, 6, 6, generator=g) for _ in range(4)]


def shift(model, scale=1.3):
    return bn_shift(model, images(scale), progress=False)


def test_columns_of_the_contract_come_first():
    df = shift(net())
    assert list(df.columns) == COLUMNS and isinstance(df, pd.DataFrame)
    assert list(bn_drift(net(), snapshot(net())).columns) == COLUMNS[:4]
    assert list(recalibrate_bn(net(), images(), progress=False).columns) == COLUMNS[:4]
    assert df.dead.tolist() == [0] * 3 and df.kl_median.notna().all()


def test_dead_is_below_eps_and_counted_apart():
    model = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3))
    model[0].running_var.copy_(torch.tensor([1e-12, 0.9e-3, 1e-3, 1.0]))
    model[0].running_mean.copy_(torch.tensor([100.0, -100.0, 0.0, 0.0]))
    x = torch.tensor([[0.0, 0.0, -1.0, -1.0], [0.0, 0.0, 1.0, 1.0]])
    df = bn_shift(model, [x], progress=False)
    var = torch.tensor([2.0])  # unbiased
    by_hand = [symmetric_kl(torch.zeros(1), var, torch.zeros(1), torch.tensor([v])).item() for v in (1e-3, 1.0)]
    assert df.dead.item() == 2 and df.kl_median.item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)
    assert df.kl.item() > 1e6 * df.kl_median.item() / 1e3


def test_all_channels_dead():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].running_var.zero_()
    df = bn_shift(model, [torch.randn(8, 2)], progress=False)
    assert df.dead.item() == 2 and df.kl_median.isna().all() and 'next to no stored variance: 2' in df.summary


@pytest.mark.parametrize('layer', [1, 4, 7])
def test_a_few_dead_channels_cannot_rule_the_summary(layer):
    model = net()
    before = shift(model)
    model[layer].running_var[:3] = 1e-12
    after = bn_shift(model, [x for x in images(1.3)], progress=False)
    here = [1, 4, 7].index(layer)
    assert after.kl[here] > 100 * before.kl[here] and after.dead.sum() == 3
    assert after.typical < 3 * before.typical and 'next to no stored variance: 3' in after.summary


def test_the_first_layer_stands_apart():
    model = net()
    before = shift(model, 1.0)
    model[1].running_mean.add_(1000)  # bn_shift normalises by the batch, so what later layers see stays
    after = shift(model, 1.0)
    assert after.kl_median[0] > 1e4 and after.typical == pytest.approx(before.typical, abs=1e-3)
    assert f'{after.kl_median[0]:.3g}' in after.summary


def test_shown_above_its_table_and_by_a_learner():
    df = shift(net())
    assert repr(df).startswith(df.summary + '\n') and 'Channels with next to no stored variance: none.' in df.summary
    assert df._repr_html_().startswith(f'<p>{df.summary}</p><div>') and f'{df.typical:.3g} nats' in df.summary
    learn = make_learner()
    learn.fit(1)
    assert learn.bn_shift().summary in repr(learn.bn_shift())


def test_it_is_a_frame_like_any_other():
    df = shift(net())
    some = df.query("layer != '1'").reset_index(drop=True)
    assert some.summary.startswith('Shift') and len(some) == 2
    for part in (df[['layer', 'kl']], df.iloc[:0], df.set_index('layer')[['kl']]):
        assert part.summary == '' and repr(part) and isinstance(part._repr_html_(), str)
    turned = df.iloc[::-1].reset_index(drop=True)  # the first layer is known by name
    assert turned.summary == df.summary == pickle.loads(pickle.dumps(df)).summary and df.set_index('layer').summary == ''
    assert some.typical == df.typical and 'first layer).' in some.summary
    assert pickle.loads(pickle.dumps(df)).equals(df) and deepcopy(df).equals(df)
    assert pd.concat([df, df]).shape == (6, 6) and df[['kl', 'kl_median']].mean().notna().all()
    assert df[['kl', 'dead']].median().notna().all()
    assert df.describe().loc['count', 'kl'] == 3


def test_layers_without_a_measurement():
    model = net(2)
    model.add_module('unused', nn.BatchNorm2d(4))
    model.forward = lambda x: nn.Sequential(*[m for n, m in model.named_children() if n != 'unused'])(x)
    with pytest.warns(UserWarning, match='unused'):
        df = shift(model)
    assert df.kl_median.isna().tolist() == [False, False, True] and df.dead.tolist() == [0, 0, 0]
