"Conversion: statistics of the data, without a change of what the network computes, and then mode `'train'`"

from copy import deepcopy

import pandas as pd, pytest, torch
from conftest import Body
from fastai.torch_core import trainable_params
from learners import bits, body_and_head, make_learner, same, pretrained
from torch import nn

from bnfreeze_fastai.choose.compare import bn_compare
from bnfreeze_fastai.choose.policies import check_policies, put_policy
from bnfreeze_fastai.choose.runs import run_policy
from bnfreeze_fastai.freeze.callback import active_callback
from bnfreeze_fastai.freeze.policy import Policy
from bnfreeze_fastai.layers import stats_buffers
from bnfreeze_fastai.stats.recalibrate import convert_bn

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')


def data(learn, n=3):
    return [image_batch(learn, i) for i in range(n)]


def image_batch(learn, i):
    return 2 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) + 1, torch.zeros(8).long()


@torch.no_grad()
def outputs(learn, train=False):
    model = deepcopy(learn.model).train(train)
    return model(torch.cat([x for x, _ in data(learn)]))


def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize('n', [0, -1])
def test_computes_what_it_computed_and_lets_the_body_train(n):
    learn = pretrained().freeze_to_bn(n, bn='frozen', bn_above='stats-only')
    before, head = outputs(learn), bits(learn.model[1].state_dict().values())
    assert learn.convert_bn(dl=data(learn)) is learn
    assert close(outputs(learn), before) and same(head, learn.model[1].state_dict().values())
    assert active_callback(learn).bn_policy == Policy('train', 'stats-only', throughout=True) and learn.opt.frozen_idx == n % 2
    assert (learn.bn_shift(dl=data(learn)).query('layer == "0.1"').kl < 1e-9).all()
    assert learn.bn_summary().df['mode'].tolist() == ['train', 'train', 'stats-only']
    assert (learn.bn_summary().df[['stats_moved', 'affine_moved']] == 0).all(axis=None)  # counted from here
    assert all(p.requires_grad for p in learn.model[0][1].parameters())
    learn.fit(1)


def test_training_and_evaluation_agree_on_the_data_as_one_batch():
    learn = pretrained().freeze_to_bn(-1, bn='train', throughout=True)
    learn.model[1][2] = nn.Identity()
    apart = (outputs(learn, train=True) - outputs(learn)).abs().max()
    learn.convert_bn(dl=data(learn))
    assert close(outputs(learn, train=True), outputs(learn), 0.01) and apart > 0.1


def test_a_glob_converts_some_and_keeps_the_rest_of_the_policy():
    learn = pretrained().freeze_to_bn(-1, bn='affine-only')
    second = bits(learn.model[0][4].state_dict().values())
    learn.convert_bn(dl=data(learn), layers='0.1')
    assert learn.bn_summary().df['mode'].tolist() == ['train', 'affine-only', 'train']
    assert same(second, learn.model[0][4].state_dict().values())
    learn = pretrained().freeze_to_bn(-1, bn={'0.1': 'frozen', '0.4': 'stats-only'})
    learn.convert_bn(dl=data(learn), layers='0.1')
    assert learn.bn_summary().df['mode'].tolist() == ['train', 'stats-only', 'train']


@pytest.mark.parametrize('layers', [None, '0.*'])
def test_what_is_converted_trains_whatever_the_mode_of_what_trains(layers):
    learn = pretrained().freeze_to_bn(0, bn_above='affine-only').convert_bn(layers=layers)
    assert learn.bn_summary().df['mode'].tolist() == ['train', 'train', 'affine-only']
    learn.fit(1)
    assert learn.bn_summary().df['stats_moved'].gt(0).tolist() == [True, True, False]


def test_throughout_stays():
    learn = pretrained().freeze_to_bn(0, bn='affine-only', bn_above='stats-only', throughout=True).convert_bn()
    assert learn.bn_summary().df['mode'].tolist() == ['train', 'train', 'stats-only']


def test_without_optimizer_or_policy():
    learn = pretrained()
    learn.convert_bn(dl=data(learn))
    assert learn.bn_summary().df['mode'].tolist() == ['train'] * 3 and all(p.requires_grad for p in learn.model.parameters())


def test_what_was_frozen_by_hand_stays_frozen():
    learn = pretrained(splitter=trainable_params)
    for m in (learn.model[0][0], learn.model[0][3]):
        m.requires_grad_(False)
    body = Body(learn.model[0])
    learn.convert_bn(dl=data(learn))
    body.before['others'] = bits(body.parts(learn.model[0])['others'])
    learn.fit(1)
    assert 'others' not in body.moved()


def test_the_freeze_point_is_that_in_force():
    learn = pretrained().freeze_to_bn(-1)
    learn.create_opt()  # forgets the freeze point on record
    learn.convert_bn(dl=data(learn))
    body = Body(learn.model[0])
    learn.fit(1)
    assert body.moved() == {'stats', 'affine'}


def test_one_group_converts_what_came_trained():
    learn = pretrained(splitter=trainable_params).freeze_to_bn(0, throughout=True)
    learn.fit(1)
    head = bits(stats_buffers(learn.model[1][2]).values())
    learn.convert_bn(dl=data(learn))
    assert same(head, stats_buffers(learn.model[1][2]).values())


@pytest.mark.parametrize('had_opt', [True, False])
def test_bad_input_changes_nothing(had_opt):
    nan = [(x * float('nan'), y) for x, y in data(None)]
    for kwargs, words in [
        (dict(layers='9.*'), "'9.*'"),
        (dict(layers=3), 'glob'),
        (dict(dl=[]), 'no batches'),
        (dict(dl=nan), 'not finite'),
        (dict(n_batches=0), 'n_batches'),
        (dict(ds_idx=7), 'ds_idx'),
    ]:
        learn = pretrained()
        if had_opt:
            learn.freeze_to_bn(-1)
        before, flags = bits(learn.model.state_dict().values()), [p.requires_grad for p in learn.model.parameters()]
        opt, cbs = learn.opt, list(learn.cbs)
        with pytest.raises(ValueError, match=words.replace('*', r'\*')):
            learn.convert_bn(**kwargs)
        assert same(before, learn.model.state_dict().values()) and (learn.opt, list(learn.cbs)) == (opt, cbs)
        assert flags == [p.requires_grad for p in learn.model.parameters()]
        if had_opt:
            assert active_callback(learn).bn_policy == Policy(throughout=True)


def test_nothing_to_convert():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = make_learner(nn.Sequential(body, nn.Linear(4, 2)))
    with pytest.raises(ValueError, match='nothing to convert.*glob `layers`'):
        learn.convert_bn()
    learn = pretrained()
    learn.model[0][1] = nn.BatchNorm2d(4, affine=False)
    with pytest.raises(ValueError, match="'0.1'.*glob"):
        learn.convert_bn()


def test_refused_inside_precompute():
    learn = pretrained().freeze_to_bn(-1)
    with learn.precompute(), pytest.raises(RuntimeError, match='convert_bn'):
        learn.convert_bn()


def norms(var, scale, dtype=torch.float32):
    "A batch norm of pretrained variance `var` and data of standard deviation `scale`, channel by channel"
    bn = nn.BatchNorm1d(len(var))
    bn.running_var.copy_(torch.tensor(var))
    x = torch.randn(256, len(var), generator=torch.Generator().manual_seed(0)) * torch.tensor(scale)
    return nn.Sequential(bn).to(dtype).eval(), x.to(dtype)


def test_channels_with_next_to_no_variance():
    model, x = norms([1e-12, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0])
    old = deepcopy(model)
    convert_bn(model, [x, x], progress=False)
    explodes, vanishes, dead, alive = model[0].weight.tolist()
    assert explodes == pytest.approx(1e-5**-0.5, rel=0.1) and vanishes == pytest.approx(1e-5**0.5, rel=0.1)
    assert dead == 1 and alive == pytest.approx(1, rel=0.1)
    assert torch.allclose(model(x), old(x), rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype,rtol', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, rtol):
    model, x = norms([1.0, 1e-3, 1.0], [2.0, 1.0, 1e-5], dtype)
    old = deepcopy(model)
    convert_bn(model, [x, x], progress=False)
    assert all(t.dtype == dtype for t in (model[0].weight, model[0].running_var))
    assert torch.allclose(model(x).float(), old(x).float(), rtol=5 * rtol, atol=5 * rtol)


def test_half_precision_that_would_overflow_changes_nothing():
    model, x = norms([0.0, 1.0], [200.0, 1.0], torch.float16)
    model[0].weight.data[0] = 100
    before = bits(model.state_dict().values())
    with pytest.raises(ValueError, match='weight.*not finite in their type torch.float16'):
        convert_bn(model, [x, x], progress=False)
    assert same(before, model.state_dict().values())


def test_names_and_globs_without_a_learner():
    model = body_and_head().eval()
    x = torch.randn(16, 3, 8, 8)
    convert_bn(model, [x, x], ['0.1'], progress=False)
    assert model[0][1].num_batches_tracked == 2 and model[0][4].num_batches_tracked == 0
    convert_bn(model, [x, x], '0.*', progress=False)
    assert model[0][4].num_batches_tracked == 2
    with pytest.raises(ValueError, match=r"\['7'\] are no norm layers"):
        convert_bn(model, [x, x], ['0.1', '7'], progress=False)


def test_by_name_in_comparisons():
    assert check_policies(['converted', 'train']) == {'converted': 'converted', 'train': 'train'}
    learn = pretrained()
    before = outputs(learn)
    put_policy(learn, 'converted', -1)
    assert active_callback(learn).bn_policy == Policy('train', throughout=True) and close(outputs(learn), before)
    assert learn.model[0][1].num_batches_tracked == len(learn.dls.train)


def test_compared_from_the_same_weights_and_over_the_same_batches():
    compared = bn_compare(pretrained, ['train', 'converted'], 1, [0])
    assert compared.df['weights'].nunique() == 1
    by_policy = dict(tuple(compared.df.groupby('policy')))
    assert by_policy['converted']['train_loss'].tolist() != by_policy['train']['train_loss'].tolist()
    again = pd.DataFrame(run_policy(pretrained, 'converted', 0, 1))
    assert again['train_loss'].tolist() == by_policy['converted']['train_loss'].tolist()


def test_what_cannot_be_converted_is_said_before_the_first_run():
    def get_learner():
        learn = pretrained()
        learn.model[0][1] = nn.BatchNorm2d(4, affine=False)
        return learn

    with pytest.raises(ValueError, match='weight and bias'):
        bn_compare(get_learner, ['train', 'converted'], 1, [0], 'fit', 0)
