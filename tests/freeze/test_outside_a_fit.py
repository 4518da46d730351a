"What only looks like a fit changes nothing: every way by which fastai fires the events of one, on every sort of Learner"

import copy, warnings

import fastai.callback.schedule, fastai.vision.learner  # patch Learner
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.hook import layer_info
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from learners import make_learner, two_groups

from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.freeze.drift import BatchNormDrift
from bnfreeze_fastai.layers import bn_layers

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:load_learner', 'ignore:Exporting')


def events(learn):
    with learn:
        pass


def inner(learn):
    with learn:
        learn.get_preds(inner=True)


def fails(learn):
    with pytest.raises(ZeroDivisionError), learn:
        1 / 0


def nested(learn):
    with learn, learn:
        learn.validate()


WAYS = dict(
    tta=lambda l: l.tta(n=2),
    summary=lambda l: l.summary(),
    layer_info=lambda l: layer_info(l, l.dls.one_batch()[0]),
    validate=lambda l: l.validate(),
    callback_given=lambda l: l.validate(cbs=BatchNormFreeze('train')),
    get_preds=lambda l: l.get_preds(ds_idx=0, with_loss=True),
    interpretation=lambda l: Interpretation.from_learner(l).top_losses(2),
    **dict(events=events, inner=inner, fails=fails, nested=nested),
)


class Interrupts(Callback):
    def after_backward(self):
        raise KeyboardInterrupt


def fresh(make):
    return make_learner(cbs=[make(), BatchNormDrift()])


def frozen(make):
    learn = fresh(make)
    learn.freeze()
    return learn


def fitted(make):
    learn = fresh(make)
    learn.fit(1)
    learn.freeze()
    learn.fit(1)
    learn.model(torch.randn(4, 3, 8, 8)).sum().backward()
    learn.model.eval()
    return learn


def thawed(make):
    learn = fitted(make)
    learn.unfreeze()
    return learn


def interrupted(make):
    learn = fitted(make)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupts())
    return learn


def loaded(make):
    learn = fitted(make)
    learn.export('l.pkl')
    again = load_learner('l.pkl')
    again.dls = learn.dls
    return again


STATES = [fresh, frozen, fitted, thawed, interrupted, loaded]
POLICIES = dict(
    default=BatchNormFreeze,
    train=lambda: BatchNormFreeze('train'),
    all_frozen=lambda: BatchNormFreeze('frozen', 'frozen'),
    scheduled=lambda: BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')}),
)


def look(learn):
    "All that could change"
    cb, drift = active_callback(learn), next(cb for cb in learn.cbs if isinstance(cb, BatchNormDrift))
    modules = list(learn.model.modules())
    return dict(
        flags=[m.training for m in modules],
        tensors={n: t.clone() for n, t in learn.model.state_dict().items()},
        trains=[p.requires_grad for p in learn.model.parameters()],
        grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()],
        attributes=[sorted(vars(m)) for m in modules],
        hooks=[[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in modules],
        log=dict(cb.schedule_log),
        drift=len(drift.epochs),
        callbacks=list(learn.cbs),
        splitter=learn.splitter,
        freeze_point=learn.opt and learn.opt.frozen_idx,
        optimizer=learn.opt and copy.deepcopy(learn.opt.state_dict()),
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def unequal(before, after):
    return [k for k in before if not equal(before[k], after[k])]


@pytest.mark.guarantee(7)
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('state', STATES)
def test_nothing_changes(state, policy, way):
    learn = state(POLICIES[policy])
    before = look(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        WAYS[way](learn)
    after = look(learn)
    if state is interrupted:  # its hold stays until the next fit, whatever comes between
        before.pop('hooks'), after.pop('hooks'), before.pop('attributes'), after.pop('attributes')
    if way in ('summary', 'layer_info', 'validate', 'get_preds', 'tta', 'interpretation', 'inner', 'nested', 'callback_given'):
        before.pop('flags'), after.pop('flags')  # fastai's own: the model is in eval mode then
        assert not learn.model.training
    assert unequal(before, after) == []


@pytest.mark.guarantee(7)
@pytest.mark.parametrize('way', ['tta', 'validate', 'get_preds', 'inner'])
def test_results_are_those_without_the_callback(way):
    learn = fitted(BatchNormFreeze)
    ours = WAYS[way](learn)
    learn.remove_cbs([BatchNormFreeze, BatchNormDrift])
    plain = WAYS[way](learn)
    assert str(ours) == str(plain)


@pytest.mark.parametrize('way', sorted(WAYS.keys() - {'summary', 'layer_info'}))  # which draw another batch
@pytest.mark.parametrize('event', ['before_train', 'after_batch'])
def test_within_a_fit_it_goes_on_as_before(way, event):
    "Losses, modes and the schedule of a fit are the same with and without a look from inside"

    class Looks(Callback):
        order = 50

        def look(self):
            if event == 'after_batch' and not (self.training and self.train_iter % 3 == 2):
                return
            state = {
                k: getattr(self.learn, k, None) for k in ('dl', 'train_iter', 'n_iter', 'iter', 'training', 'xb', 'yb', 'pred', 'loss')
            }
            counts, kept = self.learn.epoch, self.learn.recorder.__dict__.copy()
            torch.manual_seed(0)
            WAYS[way](self.learn)
            torch.manual_seed(0)
            self.learn.epoch = counts
            self.learn.recorder.__dict__.update(kept)
            for k, v in state.items():
                setattr(self.learn, k, v)
            self.learn.model.train()

    class Seeds(Callback):
        def reseed(self):
            torch.manual_seed(0)

    setattr(Looks, event, Looks.look)
    setattr(Seeds, event, Seeds.reseed)
    results = []
    for cb in (Seeds, Looks):
        learn = make_learner(cbs=BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')}))
        learn.freeze()
        learn.fit(2, cbs=cb())
        cb = active_callback(learn)
        results.append((learn.model.state_dict(), cb.schedule_log, cb.modes()))
        assert not any(l._forward_hooks for l in bn_layers(learn.model))
    assert equal(*results)


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'before_train', 'before_batch'])
def test_a_fit_that_fails_before_it_trains_can_be_taken_back(event, error):
    class Fails(Callback):
        order = 50

        def fail(self):
            raise error('stop')

    setattr(Fails, event, Fails.fail)
    plain, learn = make_learner(), make_learner(cbs=BatchNormFreeze())
    for l in (plain, learn):
        l.freeze()
    with pytest.raises(error):
        learn.fit(1, cbs=Fails())
    learn.remove_cb(BatchNormFreeze)
    assert [p.requires_grad for p in learn.model.parameters()] == [p.requires_grad for p in plain.model.parameters()]
    assert not any(l._forward_hooks or l._forward_pre_hooks for l in bn_layers(learn.model)) and learn.splitter is two_groups
