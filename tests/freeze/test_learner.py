"`freeze_to_bn` and `bn_summary`"

import numpy as np, pytest, torch
from fastai.torch_core import trainable_params
from learners import body_and_head, make_learner
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.layers import affine_params, MODES

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
COLUMNS = ['layer', 'type', 'group', 'mode', 'affine_trainable', 'momentum', 'batches_tracked', 'stats_moved', 'affine_moved']


def state(learn):
    return learn.opt, list(learn.cbs), [p.requires_grad for p in learn.model.parameters()], learn.splitter


@pytest.mark.parametrize('n', [1, -1, np.int64(1), np.int8(-1), torch.tensor(1)])
def test_any_integer_type(n):
    learn = make_learner()
    assert learn.freeze_to_bn(n) is learn and learn.opt.frozen_idx == 1


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(n=2),
        dict(n=-3),
        dict(n=99),
        dict(n=1.0),
        dict(n='body'),
        dict(n=None),
        dict(n=-1, bn='eval'),
        dict(n=-1, bn_above='off'),
        dict(n=-1, bn={'9.*': 'train'}),
        dict(n=-1, bn_above={'0.*': 'never'}),
        dict(n=-1, bn=3),
    ],
)
@pytest.mark.parametrize('had_opt', [True, False])
def test_bad_input_changes_nothing(kwargs, had_opt):
    learn = make_learner()
    if had_opt:
        learn.create_opt()
    before = state(learn)
    with pytest.raises(ValueError):
        learn.freeze_to_bn(**kwargs)
    assert state(learn) == before
    learn.freeze_to_bn(-1, bn='stats-only')
    before, policy = state(learn), active_callback(learn).bn_policy
    with pytest.raises(ValueError):
        learn.freeze_to_bn(**kwargs)
    assert state(learn) == before and active_callback(learn).bn_policy == policy


def test_bad_policies_are_refused_with_the_callback():
    for make in (lambda: BatchNormFreeze(bn='eval'), lambda: BatchNormFreeze(bn_above={'*': 'on'})):
        with pytest.raises(ValueError, match="'train', 'stats-only', 'affine-only', 'frozen'"):
            make()


@pytest.mark.parametrize('n', [-1, -2])
def test_one_group_has_nothing_to_freeze(n):
    learn = make_learner(splitter=trainable_params)
    with pytest.raises(ValueError, match='1 parameter group;.*splitter='):
        learn.freeze_to_bn(n)
    with pytest.raises(ValueError, match='splitter='):
        learn.freeze_to_bn(1)
    learn.freeze_to_bn(0)


def test_none_keeps_what_is_set():
    learn = make_learner().freeze_to_bn(-1)
    policy = lambda: tuple(active_callback(learn).bn_policy)[:2]
    assert policy() == ('frozen', 'train')
    learn.freeze_to_bn(-1, bn='stats-only')
    learn.freeze_to_bn(0, bn_above='affine-only')
    assert policy() == ('stats-only', 'affine-only') and len([cb for cb in learn.cbs if isinstance(cb, BatchNormFreeze)]) == 1
    learn.freeze_to_bn(-1)
    assert policy() == ('stats-only', 'affine-only')


@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_tensors_show_the_policy_at_once(mode, train_bn):
    learn = make_learner(train_bn=train_bn).freeze_to_bn(-1, bn=mode)
    assert [p.requires_grad for p in learn.model[0].parameters()] == [
        p in set(affine_params(learn.model[0][1]) + affine_params(learn.model[0][4])) and MODES[mode].trains_affine
        for p in learn.model[0].parameters()
    ]
    assert all(p.requires_grad for p in learn.model[1].parameters())


def test_summary_tells_what_the_next_fit_will_do_and_what_the_last_one_moved():
    learn = make_learner().freeze_to_bn(0)
    learn.fit(1)
    learn.freeze_to_bn(-1, bn={'0.1': 'affine-only', '*': 'stats-only'})
    assert (learn.bn_summary().df[['stats_moved', 'affine_moved']] == 0).all(axis=None)
    learn.fit(1)
    df = learn.bn_summary().df.set_index('layer')
    assert list(df.reset_index().columns) == COLUMNS
    assert df['mode'].to_dict() == {'0.1': 'affine-only', '0.4': 'stats-only', '1.2': 'train'}
    assert df['group'].tolist() == [0, 0, 1] and df['type'].tolist() == ['BatchNorm2d', 'BatchNorm2d', 'BatchNorm1d']
    assert df['affine_trainable'].tolist() == [True, False, True] and df['momentum'].tolist() == [0.1] * 3
    assert df['batches_tracked'].tolist() == [3, 6, 6]
    assert (df['stats_moved'] > 0).tolist() == [False, True, True] and (df['affine_moved'] > 0).tolist() == [True, False, True]


def test_summary_of_every_sort_of_layer():
    model = body_and_head()
    model[0] = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        FrozenBatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    learn = make_learner(model=model)
    summary = learn.freeze_to_bn(-1, bn='affine-only').bn_summary()
    df = summary.df.set_index('layer')
    assert df['mode'].tolist() == ['frozen', 'affine-only', 'affine-only', 'affine-only', 'train']
    assert df['affine_trainable'].tolist() == [False, False, True, True, True]
    assert df['batches_tracked'].isna().tolist() == [True, False, True, True, False]
    assert (
        'FrozenBatchNorm2d' in repr(summary)
        and 'FrozenBatchNorm2d' in summary._repr_html_()
        and '5 norm layers: 3 affine-only' in repr(summary)
    )


def test_summary_without_the_callback_reads_the_tensors():
    learn = make_learner()
    learn.freeze()
    df = learn.bn_summary().df
    assert df['mode'].tolist() == ['train'] * 3 and df['stats_moved'].isna().all()  # fastai trains frozen batch norm


def test_no_norm_layers():
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Linear(4, 2))
    learn = make_learner(model=model).freeze_to_bn(-1)
    learn.fit(1)
    assert 'no norm layers' in repr(learn.bn_summary()) and learn.bn_summary().df.empty and list(learn.bn_summary().df.columns) == COLUMNS


def test_movement_is_exact():
    learn = make_learner().freeze_to_bn(0)
    learn.fit(1)
    learn.freeze_to_bn(0)
    bn = learn.model[0][1]
    with torch.no_grad():
        bn.bias.add_(0.25)
    bn.running_mean.copy_(bn.running_mean + bn.running_var.double().sqrt())
    row = learn.bn_summary().df.set_index('layer').loc['0.1']
    assert row.stats_moved == pytest.approx(1, rel=1e-5)  # a shift of one standard deviation: KL 1/2 + 1/2
    assert row.affine_moved == pytest.approx(0.25 / 2**0.5, rel=1e-5)
    with torch.no_grad():
        bn.running_mean[0] += 1e-6
    assert learn.bn_summary().df.set_index('layer').loc['0.4'].stats_moved == 0
