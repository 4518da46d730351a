"Corner cases that once went wrong: who owns a freeze point, a hold, a splitter or a flag when several hands change them"

import warnings
from contextlib import nullcontext
from copy import copy

import fastai.callback.schedule
import pytest, torch
from conftest import Body, loads_without_this_package, may_move
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException
from fastai.learner import load_learner
from fastai.torch_core import params, trainable_params
from learners import bits, body_and_head, make_learner, OPTIMIZERS, same, two_groups
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from bnfreeze_fastai.core import hold_bn_mode, set_bn_mode
from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.freeze.drift import BatchNormDrift
from bnfreeze_fastai.freeze.fuse import BatchNormFuse
from bnfreeze_fastai.freeze.recalibrate import BatchNormRecalibrate
from bnfreeze_fastai.holds import holds_on
from bnfreeze_fastai.layers import bn_layers, norm_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:load_learner', 'ignore:Lazy modules')


def trained(**kwargs):
    learn = make_learner(**kwargs)
    learn.fit(1)
    return learn


def norm_only():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def modes(learn):
    return learn.bn_summary().df['mode'].tolist()


def interrupted(learn):
    class Interrupts(Callback):
        order = 1000

        def after_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupts())
    return learn


def moves(learn):
    "What a forward pass in training mode, outside any fit, moves in the body"
    body = Body(learn.model[0])
    learn.model.train()(torch.randn(8, 3, 8, 8))
    return body.moved()


def export(learn):
    learn.export('e.pkl')


# The freeze point

REMAKES = dict(create=lambda l: l.create_opt(), reset=lambda l: l.fit(1, reset_opt=True), export=export)


@pytest.mark.guarantee(3)
@pytest.mark.parametrize('remake', REMAKES.values(), ids=REMAKES)
def test_norm_layers_in_a_group_of_their_own_stay_frozen_when_the_optimizer_is_made_anew(remake):
    learn = trained(splitter=three_by_kind, cbs=BatchNormFreeze())
    learn.freeze()
    body = Body(learn.model[0])
    remake(learn)
    learn.fit(1)
    assert body.moved() == set() and modes(learn) == ['frozen', 'frozen', 'train']


def three_by_kind(m):
    return [params(m[0][0]) + params(m[0][3]), params(m[0][1]) + params(m[0][4]), params(m[1])]


def test_the_last_freeze_point_counts_even_if_no_fit_saw_it():
    learn = trained(splitter=lambda m: [params(m[0][1]), params(m[0][4]), params(m[0][0]) + params(m[0][3]) + params(m[1])])
    learn.freeze_to_bn(2, throughout=False)
    learn.freeze_to(1)
    learn.create_opt()
    assert modes(learn) == ['frozen', 'train', 'train']


def test_a_callback_given_to_fit_takes_the_freeze_point_over_and_gives_it_back():
    learn = trained(model=norm_only()).freeze_to_bn(1)
    learn.create_opt()
    body = Body(nn.Sequential(learn.model[0]))
    learn.fit(1, cbs=BatchNormFreeze())
    assert body.moved() == set() and modes(learn) == ['frozen']
    learn.fit(1, cbs=BatchNormFreeze(bn='train'))
    assert body.moved() == {'stats', 'affine'} and modes(learn) == ['frozen']


def test_a_callback_given_to_another_learner_starts_anew_there_and_stays_as_it_was_in_the_first():
    cb = BatchNormFreeze()
    first, second = trained(model=norm_only(), train_bn=False, cbs=cb), trained(model=norm_only())
    first.freeze_to(1)
    first.fit(1)
    second.add_cb(cb)
    assert modes(first) == ['frozen'] and modes(second) == ['train']
    body = Body(nn.Sequential(second.model[0]))
    second.fit(1)
    assert body.moved() == {'stats', 'affine'}
    second.remove_cb(cb)
    first.remove_cb(BatchNormFreeze)
    assert first.splitter is second.splitter is two_groups


def test_a_splitter_may_be_a_generator():
    learn = make_learner(splitter=lambda m: m.parameters(), cbs=BatchNormFreeze(bn_above='affine-only'))
    learn.fit(1)
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters()))


def test_removing_the_callback_not_in_force_changes_nothing():
    learn = trained(cbs=[BatchNormFreeze('train'), BatchNormFreeze()])
    learn.freeze()
    learn.fit(1)
    body = Body(learn.model[0])
    learn.remove_cb(next(cb for cb in learn.cbs if isinstance(cb, BatchNormFreeze)))
    learn.create_opt()
    learn.fit(1)
    assert body.moved() == set()


# What was frozen by hand


def test_parameters_frozen_by_hand_after_a_fit_are_not_stepped():
    learn = trained(splitter=trainable_params, cbs=BatchNormFreeze())
    learn.model[0][0].requires_grad_(False)
    learn.create_opt()
    before = bits(learn.model[0][0].parameters())
    learn.fit(1)
    assert same(before, learn.model[0][0].parameters())


def test_a_bias_left_out_of_the_optimizer_does_not_free_its_weight():
    model = body_and_head()
    model[0][1].bias.requires_grad_(False)
    learn = make_learner(model=model, splitter=trainable_params, cbs=BatchNormFreeze(bn_above='frozen'))
    before = bits(model[0][1].parameters())
    learn.fit(1)
    assert same(before, model[0][1].parameters())


@pytest.mark.guarantee(1)
@pytest.mark.parametrize('rule', [{'0.1': 'frozen', '0.4': 'train'}, {'0.1': 'train', '0.4': 'frozen'}])
def test_a_tied_weight_is_fixed_if_either_layer_fixes_it(rule):
    model = body_and_head()
    model[0][4].weight = model[0][1].weight
    learn = trained(model=model).freeze_to_bn(0, bn_above=rule)
    before = bits([model[0][1].weight])
    learn.fit(1)
    assert same(before, [model[0][1].weight])


@pytest.mark.parametrize('way', ['add and remove', 'given to fit', 'given to validate'])
def test_removal_gives_back_what_was_frozen_by_hand(way):
    learn = make_learner()
    learn.model[0][1].requires_grad_(False)
    learn.fit(1)
    flags = [p.requires_grad for p in learn.model.parameters()]
    if way == 'add and remove':
        cb = BatchNormFreeze()
        learn.add_cb(cb)
        learn.remove_cb(cb)
    elif way == 'given to fit':
        learn.fit(1, cbs=BatchNormFreeze(bn_above='frozen'))
    else:
        learn.validate(cbs=BatchNormFreeze())
    assert [p.requires_grad for p in learn.model.parameters()] == flags


def test_what_a_callback_turns_off_without_a_freeze_point_stays_off():
    seen = []

    class LikeGan(Callback):
        "Turns one network off while another trains, as `GANTrainer` does"

        def before_epoch(self):
            self.learn.model[0].requires_grad_(False)

        def after_pred(self):
            if self.training:
                seen.append([p.requires_grad for p in self.learn.model[0].parameters()])

    learn = make_learner(splitter=trainable_params, cbs=[BatchNormFreeze(), LikeGan()])
    learn.fit(2)
    assert not any(map(any, seen))


def test_what_is_switched_off_and_on_within_an_epoch_trains_while_it_is_on():
    class Alternates(Callback):
        def before_batch(self):
            self.learn.model[0].requires_grad_(self.train_iter % 2 == 1)

    learn = make_learner(splitter=trainable_params, cbs=[BatchNormFreeze(bn_above={'0.1': 'frozen', '*': 'train'}), Alternates()])
    first, second = bn_layers(learn.model[0])
    before = bits(first.state_dict().values()), bits(second.parameters())
    learn.fit(2)
    assert same(before[0], first.state_dict().values()) and not same(before[1], second.parameters())


# Leaving


@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('n,policy', [(0, dict(bn_above='stats-only')), (-1, dict(bn='frozen')), (-1, dict(bn='train'))])
@pytest.mark.parametrize('splitter', [two_groups, trainable_params])
def test_removal_from_a_loaded_learner(n, policy, train_bn, splitter):
    if splitter is trainable_params and n:
        return
    learn = trained(train_bn=train_bn, splitter=splitter).freeze_to_bn(n, **policy)
    learn.fit(1)
    learn.export('e.pkl')
    loaded = load_learner('e.pkl')
    loaded.remove_cb(BatchNormFreeze)
    learn.remove_cb(BatchNormFreeze)
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in learn.model.parameters()]
    assert loaded.opt is None and loaded.splitter is splitter


def test_two_callbacks_leave_in_any_order():
    for order in (1, -1):
        learn = make_learner(cbs=[BatchNormFreeze(), BatchNormFreeze('train')])
        learn.fit(1)
        for cb in [cb for cb in learn.cbs if isinstance(cb, BatchNormFreeze)][::order]:
            learn.remove_cb(cb)
        assert learn.splitter is two_groups
        learn.export('e.pkl')
        assert loads_without_this_package(learn.path / 'e.pkl')


def test_lazy_layers_can_be_given_back():
    learn = make_learner(model=body_and_head(lambda n: nn.LazyBatchNorm2d()), cbs=BatchNormFreeze(bn_above='frozen'))

    class Interrupts(Callback):
        def before_batch(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupts())
    learn.create_opt()
    learn.remove_cb(BatchNormFreeze)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_an_export_after_an_interrupt_leaves_nothing_behind():
    learn = interrupted(trained().freeze_to_bn(-1))
    learn.export('e.pkl')
    loaded = load_learner('e.pkl')
    loaded.remove_cb(BatchNormFreeze)
    assert not any(l._forward_pre_hooks or l._forward_hooks for l in bn_layers(loaded.model))
    loaded.export('again.pkl')
    assert loads_without_this_package(loaded.path / 'again.pkl') and not loads_without_this_package(learn.path / 'e.pkl')


# Holds of several owners


def test_an_interrupted_fit_does_not_touch_holds_of_others():
    learn = interrupted(trained().freeze_to_bn(-1))
    with hold_bn_mode(learn.model, 'frozen'):
        learn.fit(1)
        assert moves(learn) == set()
    assert moves(learn) == {'stats'}

    learn = interrupted(trained().freeze_to_bn(-1))
    with hold_bn_mode(learn.model, 'frozen'):
        learn.remove_cb(BatchNormFreeze)
        assert moves(learn) == set()
    assert moves(learn) == {'stats'}

    learn = interrupted(trained().freeze_to_bn(0))
    set_bn_mode(learn.model, 'frozen')
    learn.remove_cb(BatchNormFreeze)
    assert moves(learn) == set()

    learn = trained().freeze_to_bn(-1)
    with hold_bn_mode(learn.model, 'frozen'):
        interrupted(learn)
    learn.remove_cb(BatchNormFreeze)
    assert moves(learn) == {'stats'}


def test_a_mode_set_in_a_fit_holds_after_it():
    class Sets(Callback):
        def after_epoch(self):
            set_bn_mode(self.learn.model, 'frozen')

    learn = trained().freeze_to_bn(0)
    learn.fit(1, cbs=Sets())
    assert moves(learn) == set()


def test_a_hold_keeps_gradients():
    model = body_and_head()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    with hold_bn_mode(model, 'frozen'):
        assert model[0][1].weight.grad is None
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()]))


def test_flags_in_a_fit_are_what_train_and_eval_said():
    class Watched(nn.GroupNorm):
        def forward(self, x):
            flags.add(self.training)
            return super().forward(x)

    flags, seen = set(), []
    learn = make_learner(model=body_and_head(lambda n: Watched(2, n))).freeze_to_bn(-1)

    class Look(Callback):
        run_valid = False

        def after_pred(self):
            seen.append(all(m.training for m in self.learn.model.modules()))

    learn.fit(1, cbs=Look())
    assert flags == {True, False} and all(seen)


# Compiled models


@pytest.mark.guarantee(2)
@pytest.mark.parametrize('first', ['train', 'stats-only'])
@pytest.mark.parametrize('compiled', ['whole', 'in place', 'part'])
def test_train_calls_on_a_compiled_model(first, compiled):
    class Trains(Callback):
        order = 1000
        run_valid = False

        def before_batch(self):
            self.learn.model.train()

    torch.compiler.reset()
    learn = make_learner(cbs=Trains())
    body = learn.model[0]
    if compiled == 'whole':
        learn.model = torch.compile(learn.model, backend='eager')
        learn.splitter = lambda m: two_groups(m._orig_mod)
    elif compiled == 'in place':
        learn.model.compile(backend='eager')
    else:
        body.compile(backend='eager')
    learn.fit(1)
    for mode in (first, 'frozen', 'affine-only', first):
        learn.freeze_to_bn(-1, bn=mode)
        before = Body(body)
        learn.fit(1)
        assert before.moved() == may_move(mode), mode
    learn.freeze_to_bn(-1, bn='frozen').fit(1)
    learn.remove_cb(BatchNormFreeze)
    before = Body(body)
    learn.fit(1)
    assert 'stats' in before.moved()


# Verification


@pytest.mark.guarantee(2)
def test_a_nested_validation_does_not_end_it():
    class ValidatesThenWrites(Callback):
        def after_batch(self):
            if not self.training or self.train_iter != 1:
                return
            dl = self.dl
            self.learn.validate()
            self.learn.model.train()
            self.learn.training, self.learn.dl, self.learn.n_iter = True, dl, len(dl)
            self.learn.model[0][1].bias.data.add_(1)

    with pytest.raises(RuntimeError, match='0.1.bias'):
        trained().freeze_to_bn(-1).fit(1, cbs=ValidatesThenWrites())


def test_a_buffer_put_in_place_of_another_is_a_change():
    class Replaces(Callback):
        def after_batch(self):
            self.learn.model[0][1].running_mean = torch.zeros(4)

    with pytest.raises(RuntimeError, match='0.1.running_mean'):
        trained().freeze_to_bn(-1).fit(1, cbs=Replaces())


def test_validation_leaves_no_trace():
    learn = trained()
    learn.add_cb(BatchNormFreeze())
    learn.freeze()
    look = lambda: (
        [p.requires_grad for p in learn.model.parameters()],
        [p.grad is None for p in learn.model.parameters()],
        [len(l._forward_pre_hooks) for l in bn_layers(learn.model)],
        bits(learn.model.state_dict().values()),
    )
    before = look()
    learn.validate()
    learn.get_preds()
    assert before[:3] == look()[:3] and same(before[3], look()[3])


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_optimizer_state_is_as_freeze_to_leaves_it(opt):
    plain, learn = trained(opt_func=OPTIMIZERS[opt]), trained(opt_func=OPTIMIZERS[opt])
    plain.freeze()
    learn.freeze_to_bn(-1)
    state = lambda l: [dict(l.opt.state[p]) for p, *_ in l.opt.all_params()]
    assert state(plain) == state(learn) and plain.opt.frozen_idx == learn.opt.frozen_idx


def test_a_parametrized_weight_is_fixed_too():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    model = body_and_head()
    register_parametrization(model[0][1], 'weight', Doubled())
    learn = trained(model=model).freeze_to_bn(-1)
    before = bits(model[0][1].parameters())
    learn.fit(1)
    assert same(before, model[0][1].parameters())


# Input


def test_globs_have_to_be_strings_and_policies_are_copied():
    learn = make_learner()
    for act in (lambda: learn.freeze_to_bn(-1, bn={0: 'train'}), lambda: hold_bn_mode(learn.model, 'frozen', layers=['0.*']).__enter__()):
        with pytest.raises(ValueError, match='matches no norm layer'):
            act()
    rule = {'0.*': 'train'}
    learn.freeze_to_bn(-1, bn=rule)
    rule['0.*'] = 'nonsense'
    assert modes(learn) == ['train'] * 3


def test_warnings_name_the_layers_of_a_dict():
    with pytest.warns(UserWarning, match=r"\['0.1', '0.4', '1.2'\]"):
        set_bn_mode(norm_layers(body_and_head()), 'frozen')


class At(Callback):
    "Calls a function of the Learner once, at an event"

    def __init__(self, event, function, order=0):
        self.order, self.called = order, False

        def once():
            if not self.called:
                self.called = True
                function(self.learn)

        setattr(self, event, once)


def stop(learn):
    raise KeyboardInterrupt


def held(learn):
    return [name for name, layer in norm_layers(learn.model).items() if holds_on(layer)]


@pytest.mark.parametrize(
    'kind,counts', [(BatchNormFreeze, True), (BatchNormDrift, True), (BatchNormFuse, False), (BatchNormRecalibrate, False)]
)
def test_a_callback_that_is_passed_to_a_fit_of_its_learner_stays_in_it(kind, counts):
    learn = make_learner(cbs=[cb := kind()])
    before, splitter = list(learn.cbs), learn.splitter
    with pytest.raises(ValueError, match=f'has this {kind.__name__} already') if counts else nullcontext():
        learn.fit_one_cycle(1, cbs=cb)
    assert list(learn.cbs) == before and cb.learn is learn and learn.splitter == splitter
    learn.fit(1)
    learn.add_cb(cb)
    learn.remove_cb(cb)
    assert list(learn.cbs) == before and cb.learn is learn
    learn.remove_cb(kind)
    assert cb.learn is None and held(learn) == [] and learn.splitter is two_groups


def test_bad_globs_passed_to_a_fit_leave_no_other_callback_behind():
    learn = make_learner()
    before = list(learn.cbs)
    for bad in (BatchNormFreeze({'nowhere.*': 'train'}), BatchNormFreeze(schedule={0.5: dict(bn={'nowhere.*': 'train'})})):
        with pytest.raises(ValueError, match='nowhere'):
            learn.fit_one_cycle(1, cbs=[At('after_pred', stop), bad])
        assert list(learn.cbs) == before and learn.splitter is two_groups and bad.learn is None
        with pytest.raises(ValueError, match='nowhere'):
            make_learner(cbs=bad)


@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('freeze', ['freeze', 'unfreeze'])
@pytest.mark.parametrize('off', [False, True])
def test_what_is_given_back_is_as_fastai_has_it_after_the_last_freeze_point(freeze, train_bn, off):
    def flags(**kwargs):
        model = body_and_head()
        if off:
            model[0][1].requires_grad_(False)
            model[0][4].requires_grad_(False)
        learn = make_learner(model=model, train_bn=train_bn, **kwargs)
        getattr(learn, freeze)()
        learn.fit(1)
        learn.remove_cb(BatchNormFreeze)
        return [p.requires_grad for p in learn.model.parameters()]

    assert flags(cbs=BatchNormFreeze()) == flags()


@pytest.mark.parametrize('event', ['before_train', 'after_batch'])
@pytest.mark.parametrize('again', [False, True])
def test_added_amid_an_epoch_it_holds_from_the_next_batch_on(event, again):
    learn = trained(cbs=[BatchNormFreeze()] * again)
    learn.freeze()

    def add(learn):
        if again:
            with learn.removed_cbs(learn.batch_norm_freeze):
                pass
        else:
            learn.add_cb(BatchNormFreeze())
        body.append(Body(learn.model[0]))

    body = []
    learn.fit(1, cbs=At(event, add))
    assert body[0].moved() == set() and held(learn) == []


def test_a_mode_set_by_hand_that_a_policy_overrides_is_told():
    learn = trained()
    set_bn_mode(learn.model[0], 'frozen')
    with pytest.warns(UserWarning, match=r"`set_bn_mode` has set other modes on \['0.1', '0.4'\]"):
        learn.freeze_to_bn(0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.freeze_to_bn(-1, bn='frozen')
        learn.fit(1)


def test_an_epoch_that_is_cancelled_before_its_first_batch_hides_nothing_later():
    class CancelsThenWrites(Callback):
        def before_train(self):
            if self.epoch == 0:
                raise CancelEpochException()

        def after_validate(self):
            if self.epoch == 1:
                self.model[0][0].weight.data.add_(1)

    learn = make_learner().freeze_to_bn(-1)
    with pytest.raises(RuntimeError, match='changed in the fit'):
        learn.fit(2, cbs=CancelsThenWrites())


def test_a_batch_that_is_cancelled_before_the_callback_sees_it():
    class Cancels(Callback):
        order = -20

        def before_batch(self):
            if self.training and self.iter == 0:
                raise CancelBatchException()

    learn = make_learner(cbs=BatchNormFreeze('train'))
    learn.fit(1, cbs=Cancels())
    assert held(learn) == []


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_train', 'after_epoch', 'after_fit'])
def test_another_callback_may_remove_it_amid_an_event(event):
    learn = make_learner(cbs=BatchNormFreeze())
    learn.fit(1)
    learn.fit(1, cbs=At(event, lambda learn: learn.remove_cb(BatchNormFreeze), order=-20))
    assert active_callback(learn) is None and held(learn) == [] and learn.splitter is two_groups


def test_what_is_told_once_is_told_once_where_warnings_are_errors():
    learn = make_learner(splitter=lambda m: [params(m)], cbs=BatchNormFreeze(throughout=True))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        with pytest.raises(UserWarning, match='holds nothing'):
            learn.fit(1)
        learn.fit(1)


def test_a_copy_of_the_callback_takes_no_part_in_a_fit():
    learn, other, seen = make_learner(cbs=BatchNormFreeze(bn_above='affine-only')), make_learner(), []
    learn.fit(1)

    def copied(learn):
        other.add_cb(copy(active_callback(learn)))
        seen.append(held(learn))

    learn.fit(1, cbs=At('after_pred', copied))
    assert seen == [['0.1', '0.4', '1.2']] and active_callback(other).fit_now is None and held(other) == []
