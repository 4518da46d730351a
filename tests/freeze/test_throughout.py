"Pretrained layers that keep the mode `bn` also once they are unfrozen"

import pickle, warnings
from functools import partial

import pytest, torch
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.torch_core import trainable_params
from learners import bits, make_dls, make_learner, OPTIMIZERS, same, two_groups, pretrained
from torch import nn

from bnfreeze_fastai.choose.policies import check_policies, put_policy
from bnfreeze_fastai.choose.runs import run_policy
from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.freeze.groups import Groups, pretrained_norms
from bnfreeze_fastai.freeze.in_force import modes_in_force
from bnfreeze_fastai.freeze.policy import Policy
from bnfreeze_fastai.layers import affine_params, MODES, norm_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
NAMES = ['0.1', '0.4']
ONE = trainable_params  # a splitter with one group


def globs(mode, above='train'):
    return dict(bn=mode, bn_above={'0.*': mode, '*': above})


def everything(learn):
    return bits(learn.model.state_dict().values())


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('train_bn', [True, False])
def test_fine_tune_is_that_of_the_globs_to_the_bit(mode, opt, train_bn):
    ends = []
    for policy in (globs(mode), dict(bn=mode, throughout=True)):
        learn = pretrained(opt_func=OPTIMIZERS[opt], train_bn=train_bn).freeze_to_bn(-1, **policy)
        learn.fine_tune(2)
        ends.append((everything(learn), [p.requires_grad for p in learn.model.parameters()]))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


@pytest.mark.parametrize('mode', MODES)
def test_body_keeps_its_mode_once_unfrozen(mode):
    learn = pretrained().freeze_to_bn(-1, bn=mode, throughout=True)
    for act in (learn.freeze, learn.unfreeze, learn.create_opt, lambda: learn.freeze_to(0)):
        act()
        body, head = Body(learn.model[0]), Body(learn.model[1])
        learn.fit(1)
        assert body.moved() - {'others'} == may_move(mode) and head.moved() == {'stats', 'affine', 'others'}
    assert active_callback(learn).attachment.pretrained == NAMES
    assert learn.bn_summary().df['mode'].tolist() == [mode, mode, 'train']
    assert f"bn={mode!r}, bn_above='train', throughout=True; 0 of 2" in repr(learn.bn_summary())


def test_bn_above_is_for_all_others():
    learn = pretrained().freeze_to_bn(0, bn='affine-only', bn_above={'0.*': 'train', '*': 'stats-only'}, throughout=True)
    assert learn.bn_summary().df['mode'].tolist() == ['affine-only', 'affine-only', 'stats-only']
    learn.freeze_to_bn(0, bn={'0.1': 'stats-only'}, bn_above='train', throughout=True)  # the rest of a dict for `bn` gets its default
    assert learn.bn_summary().df['mode'].tolist() == ['stats-only', 'frozen', 'train']


def test_none_keeps_it_and_false_ends_it():
    learn = pretrained().freeze_to_bn(0, throughout=True)
    policy = lambda: active_callback(learn).bn_policy
    learn.freeze_to_bn(0, bn='affine-only')
    assert policy() == Policy('affine-only', 'train', True)
    learn.freeze_to_bn(0, throughout=False)
    assert policy() == Policy('affine-only', 'train') and 'throughout' not in repr(learn.bn_summary())
    assert learn.bn_summary().df['mode'].tolist() == ['train'] * 3


def test_tensors_show_it_at_once():
    learn = pretrained().freeze_to_bn(0, bn='frozen', throughout=True)
    affine = {p for l in norm_layers(learn.model[0]).values() for p in affine_params(l)}
    assert all(p.requires_grad == (p not in affine) for p in learn.model.parameters())


@pytest.mark.parametrize('value', ['affine-only', 1, None, {}])
def test_bad_values_change_nothing(value):
    words = 'takes True or False, not .*unfrozen'
    with pytest.raises(ValueError, match=words):
        BatchNormFreeze(throughout=value)
    with pytest.raises(ValueError, match=words):
        check_policies({'mine': dict(bn='frozen', throughout=value)})
    if value is None:
        return
    learn = pretrained()
    before = learn.opt, list(learn.cbs), [p.requires_grad for p in learn.model.parameters()], learn.splitter
    with pytest.raises(ValueError, match=words):
        learn.freeze_to_bn(-1, throughout=value)
    assert before == (learn.opt, list(learn.cbs), [p.requires_grad for p in learn.model.parameters()], learn.splitter)


def test_one_group_goes_by_what_was_trained_when_the_policy_was_set():
    learn = pretrained(splitter=ONE).freeze_to_bn(0, bn='affine-only', throughout=True)
    for _ in range(2):  # after the first fit the head's statistics are trained as well
        body = Body(learn.model[0])
        learn.fit(1, reset_opt=True)
        assert body.moved() == {'affine', 'others'} and active_callback(learn).attachment.pretrained == NAMES
    learn.freeze_to_bn(0, bn='stats-only')  # what is kept includes the names
    assert learn.bn_summary().df['mode'].tolist() == ['stats-only', 'stats-only', 'train']
    learn.freeze_to_bn(0, throughout=True)
    assert learn.bn_summary().df['mode'].tolist() == ['stats-only'] * 3


@pytest.mark.parametrize('splitter', [two_groups, ONE])
def test_the_callback_takes_it_by_name(splitter):
    learn = pretrained(splitter=splitter, cbs=BatchNormFreeze('affine-only', throughout=True))
    body = Body(learn.model[0])
    learn.fit(2)
    assert body.moved() == {'affine', 'others'}
    plain = pretrained(splitter=splitter)
    body = Body(plain.model[0])
    plain.fit(2, cbs=BatchNormFreeze('frozen', 'train', True, None, True))
    assert body.moved() == {'others'}


@pytest.mark.parametrize('splitter', [two_groups, ONE])
def test_pickled_and_exported_with_its_learner(splitter):
    learn = pretrained(splitter=splitter).freeze_to_bn(0, bn='affine-only', throughout=True)
    learn.fit(1)
    learn.export('learn.pkl')
    loaded = load_learner('learn.pkl')
    loaded.dls = make_dls()
    body = Body(loaded.model[0])
    loaded.fit(1)
    assert body.moved() == {'affine', 'others'} and active_callback(loaded).bn_policy == Policy('affine-only', 'train', True)
    learn.save('model')
    learn.load('model').fit(1)
    assert learn.bn_summary().df['mode'].tolist() == ['affine-only', 'affine-only', 'train']


def test_callbacks_and_policies_of_0_1_load():
    new = pickle.dumps(Policy('frozen', 'affine-only'), 2)
    old = new.replace(b'\x89\x87', b'\x86')  # a tuple of two, as there were, and not of these and `False`
    assert old != new and pickle.loads(old) == Policy('frozen', 'affine-only', False)
    learn = pretrained(cbs=BatchNormFreeze('stats-only')).freeze_to_bn(-1)
    cb = active_callback(learn)
    cb.attachment.trained = None  # 0.1 did not keep it
    learn.export('old.pkl')
    loaded = load_learner('old.pkl')
    loaded.dls = make_dls()
    loaded.fit(1)
    assert loaded.bn_summary().df['mode'].tolist() == ['stats-only', 'stats-only', 'train']
    loaded.freeze_to_bn(0, throughout=True).fit(1)
    assert loaded.bn_summary().df['mode'].tolist() == ['stats-only', 'stats-only', 'train']


def test_a_schedule_changes_the_mode_of_pretrained_layers():
    learn = pretrained(cbs=BatchNormFreeze('stats-only', schedule={0.5: dict(bn='affine-only')}, throughout=True))
    moved, body = [], Body(learn.model[0])

    class Look(Callback):
        def after_epoch(self):
            moved.append(body.moved())
            body.before = {k: bits(v) for k, v in body.parts(body.body).items()}

    learn.fit(4, cbs=Look())
    assert moved == [{'stats', 'others'}] * 2 + [{'affine', 'others'}] * 2
    with pytest.raises(ValueError, match='holds for a whole fit'):
        BatchNormFreeze(schedule={0.5: dict(throughout=True)})


def test_verify_sees_what_is_fixed_in_trained_groups():
    class Writes(Callback):
        order = 0

        def after_batch(self):
            self.model[0][1].running_mean.add_(1)

    learn = pretrained().freeze_to_bn(0, bn='affine-only', throughout=True)
    with pytest.raises(RuntimeError, match='0.1.running_mean'):
        learn.fit(1, cbs=Writes())


def test_a_group_thawed_by_hand_keeps_the_mode():
    learn = pretrained().freeze_to_bn(-1, bn='affine-only', throughout=True)
    for p in learn.model[0].parameters():
        p.requires_grad = True
    body = Body(learn.model[0])
    with pytest.warns(UserWarning, match='their norm layers keep the mode `bn`, as `throughout` has it'):
        learn.fit(1)
    assert body.moved() == {'affine', 'others'}
    assert 'Parameter groups thawed by hand, in the mode `bn` by `throughout`: 0.' in repr(learn.bn_summary())


def test_a_layer_thawed_by_hand_and_one_frozen_by_hand():
    learn = pretrained().freeze_to_bn(-1, bn='affine-only', throughout=True)
    learn.model[0][0].requires_grad_(True)
    with pytest.warns(UserWarning, match='somebody thawed by hand'):
        learn.fit(1)
    assert learn.bn_summary().df['mode'].tolist() == ['affine-only', 'affine-only', 'train']
    learn = pretrained().freeze_to_bn(0, bn='affine-only', throughout=True)
    learn.model[1][2].requires_grad_(False)
    learn.model[1][3].requires_grad_(False)
    learn.model[0].requires_grad_(True)
    assert learn.bn_summary().df['mode'].tolist()[:2] == ['affine-only'] * 2


def test_it_tells_when_it_holds_nothing():
    learn = make_learner(splitter=ONE, cbs=BatchNormFreeze(throughout=True))
    with pytest.warns(UserWarning, match='`throughout=True` holds nothing.*`splitter`'):
        learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)


def test_removing_it_restores_plain_fastai():
    learn = pretrained().freeze_to_bn(0, bn='frozen', throughout=True)
    learn.fit(1)
    learn.remove_cb(active_callback(learn))
    assert all(p.requires_grad for p in learn.model.parameters())


def test_precompute_follows_it():
    learn = pretrained().freeze_to_bn(-1, bn='frozen', throughout=True)
    with learn.precompute():
        learn.fit(1)
    learn.freeze_to_bn(-1, bn='affine-only', throughout=True)
    with pytest.raises(ValueError, match='frozen'):
        with learn.precompute():
            pass


@pytest.mark.usefixtures('fused_at_any_size')
def test_fused_all_the_way():
    losses = []
    for fused in (False, True):
        learn = pretrained().freeze_to_bn(-1, bn='frozen', throughout=True)
        if fused:
            learn.fuse_bn()
        learn.fine_tune(2)
        losses.append(learn.recorder.losses)
    assert torch.allclose(*map(torch.stack, losses), atol=1e-4)


class Switches(Callback):
    "Freezes the whole body in every other batch, as a GAN's switcher does"

    def before_batch(self):
        on = self.iter % 2
        for p in self.model[0].parameters():
            p.requires_grad = bool(on)


def test_what_a_switcher_turns_off_is_as_under_the_globs():
    ends = []
    for policy in (globs('affine-only'), dict(bn='affine-only', throughout=True)):
        learn = pretrained(splitter=ONE).freeze_to_bn(0, **policy)
        learn.fit(2, cbs=Switches())
        ends.append(everything(learn))
    assert same(*ends)


@pytest.mark.parametrize('splitter', [two_groups, ONE])
@pytest.mark.parametrize('mode', MODES)
def test_a_mode_by_name_in_comparisons_is_what_it_was(mode, splitter):
    rows = []
    for policy in (mode, Policy(**globs(mode)), *check_policies({'a': dict(bn=mode, throughout=True)}).values()):
        made = partial(pretrained, splitter=splitter)
        epochs = run_policy(
            lambda: made(), policy, 0, 1, 'fine_tune' if splitter is two_groups else 'fit', -1 if splitter is two_groups else 0
        )
        rows.append([(r['train_loss'], r['valid_loss'], r['stats_moved'], r['affine_moved']) for r in epochs])
    assert rows[0] == rows[1] == rows[2]


def test_a_policy_may_be_called_throughout():
    named = dict(bn='affine-only', throughout=True)
    assert check_policies({'throughout': named}) == {'throughout': Policy(**named)}
    for one in (named, dict(throughout=True), Policy(**named)):
        with pytest.raises(ValueError, match='is one policy'):
            check_policies(one)


def test_put_policy_uses_the_field():
    learn = pretrained()
    put_policy(learn, 'affine-only', -1)
    assert active_callback(learn).bn_policy == Policy('affine-only', throughout=True)


def test_layers_of_all_groups_but_the_last():
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3)))
    assert pretrained_norms(Groups(model, [list(m.parameters()) for m in model])) == ['0.1', '1.1']


@pytest.mark.parametrize(
    'given,kept',
    [
        ({}, True),
        ({'bn': 'affine-only'}, True),
        ({'bn_above': 'train'}, False),
        ({'throughout': False}, False),
        ({'bn_above': 'train', 'throughout': True}, True),
    ],
    ids=str,
)
def test_what_freeze_to_bn_freezes_stays_so_unless_told_otherwise(given, kept):
    learn = pretrained().freeze_to_bn(-1, **given)
    learn.unfreeze()
    modes = {m for n, m in modes_in_force(learn).items() if n.startswith('0.')}
    assert modes == {given.get('bn', 'frozen') if kept else 'train'}


@pytest.mark.parametrize(
    'first',
    [
        lambda learn: learn.freeze_to_bn(0),
        lambda learn: learn.freeze_to_bn(0).freeze_to_bn(0, bn='affine-only'),
        lambda learn: learn.convert_bn(layers='0.1'),
        lambda learn: load_learner(learn.freeze_to_bn(0).export('e.pkl') or 'e.pkl', cpu=True),
    ],
    ids=['nothing', 'twice', 'converted', 'loaded'],
)
def test_the_first_call_that_freezes_something_decides_whatever_came_before(first):
    learn = pretrained()
    dls = learn.dls
    learn = first(learn) or learn
    learn.dls = dls
    learn.freeze_to_bn(-1, bn='frozen').unfreeze()
    assert {m for n, m in modes_in_force(learn).items() if n.startswith('0.')} == {'frozen'}


def test_what_was_decided_stays():
    for how in (dict(throughout=False), dict(bn_above='train')):
        learn = pretrained().freeze_to_bn(0, **how).freeze_to_bn(-1)
        learn.unfreeze()
        assert {*modes_in_force(learn).values()} == {'train'}
    learn = pretrained(cbs=BatchNormFreeze()).freeze_to_bn(-1)
    learn.unfreeze()
    assert {*modes_in_force(learn).values()} == {'train'}, "a callback of one's own says it itself"


def test_a_dict_is_as_for_freeze_to_bn():
    for how, kept in ((dict(bn='affine-only'), True), (dict(bn='affine-only', bn_above='train'), False), (dict(throughout=False), False)):
        policy = check_policies({'mine': how})['mine']
        assert policy.throughout == kept == active_callback(pretrained().freeze_to_bn(-1, **how)).bn_policy.throughout


def test_freezing_nothing_holds_nothing_and_a_mode_for_all_that_trains_wins():
    learn = pretrained().freeze_to_bn(0)
    assert {*modes_in_force(learn).values()} == {'train'}
    learn = pretrained().freeze_to_bn(-1).freeze_to_bn(0)
    assert {m for n, m in modes_in_force(learn).items() if n.startswith('0.')} == {'frozen'}
    learn.freeze_to_bn(0, bn_above='affine-only')
    assert {*modes_in_force(learn).values()} == {'affine-only'}
