"The frozen part of a Learner: found, watched over, and everything as it was afterwards; without a fit"

from copy import deepcopy

import pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import params
from learners import bits, body_and_head, make_learner, same
from heads import dropout_head
from test_precompute import conv, FunctionalDropout, two_input_learner
from torch import nn

from bnfreeze_fastai.freeze.callback import active_callback
from bnfreeze_fastai.head.part import frozen_part, WatchFrozen
from bnfreeze_fastai.layers import bn_layers
from bnfreeze_fastai.utils.restore import evaluating


def learner(*body):
    body = body or (conv(3), nn.BatchNorm2d(4), nn.ReLU())
    learn = make_learner(model=nn.Sequential(nn.Sequential(*body), dropout_head()))
    for l in bn_layers(learn.model):
        l.num_batches_tracked += 1  # statistics to hold
    return learn.freeze_to_bn(-1)


def batch_of(learn):
    return learn.dls.valid.one_batch()


def test_what_it_gives():
    learn = learner()
    with frozen_part(learn, 'precompute') as part:
        tried = part.find([batch_of(learn)])
        with evaluating(learn.model):
            features = part.features(batch_of(learn))
            assert torch.equal(features, learn.model[1][:2](learn.model[0](tried)))
    assert features.shape == (8, 4)


def found(learn):
    with frozen_part(learn, 'precompute') as part:
        part.find([batch_of(learn)])
    return part


MOVES = {
    'weights': lambda learn: learn.model[0][0].weight.data.add_(1),
    'statistics': lambda learn: learn.model[0][1].running_mean.add_(1),
    'thawed': lambda learn: learn.model[0].requires_grad_(True),
    'another model': lambda learn: setattr(learn, 'model', body_and_head()),
}


@pytest.mark.parametrize('name', MOVES)
def test_what_moves_it_is_seen(name):
    learn = learner()
    part = found(learn)
    with part.used_by(WatchFrozen(part)):
        part.check()
        MOVES[name](learn)
        with pytest.raises(RuntimeError, match='enter it again'):
            part.check()
    assert not any(isinstance(cb, WatchFrozen) for cb in learn.cbs)


def test_what_trains_may_move():
    learn = learner()
    part = found(learn)
    with part.used_by(WatchFrozen(part)):
        for t in learn.model[1].state_dict().values():
            t.add_(1)
        part.check()


def test_thawed_is_seen_without_a_look_at_the_tensors():
    learn = learner()
    part = found(learn)
    with part.used_by(WatchFrozen(part)):
        learn.model[0][0].weight.data.add_(1)
        part.check(tensors=False)
        learn.model[0].requires_grad_(True)
        with pytest.raises(RuntimeError):
            part.check(tensors=False)


REFUSED = {
    'nothing frozen': (lambda: learner().freeze_to_bn(0), 'Nothing is frozen'),
    'dropout': (lambda: learner(conv(3), FunctionalDropout(), conv()), 'random in training'),
    'two inputs': (two_input_learner, '2 inputs'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_a_refusal_takes_back_the_optimizer(name):
    make, said = REFUSED[name]
    learn = make()
    before = set(vars(learn))
    learn.opt = None
    with pytest.raises(ValueError, match=said), frozen_part(learn, 'precompute') as part:
        part.find([batch_of(learn)])
    assert learn.opt is None and set(vars(learn)) == before


@pytest.mark.parametrize('failure', [KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_after_it_is_in_use_does_not(failure):
    learn = learner()
    learn.opt = None
    before = set(vars(learn))
    with pytest.raises(failure), frozen_part(learn, 'precompute') as part:
        part.find([batch_of(learn)])
        with part.used_by(WatchFrozen(part)):
            raise failure
    assert learn.opt is not None and set(vars(learn)) == before
    assert not any('forward' in vars(m) for m in learn.model.modules())


def test_methods_raise_inside_and_are_back_afterwards():
    learn = learner()
    with frozen_part(learn, 'fold_frozen'):
        for name in ('freeze', 'unfreeze', 'export', 'precompute', 'recalibrate_bn'):
            with pytest.raises(RuntimeError, match=f'`{name}` inside `with learn.fold_frozen'):
                getattr(learn, name)()
    learn.unfreeze()


WAYS = pytest.mark.parametrize('way', ['precompute', 'fold_frozen'])


@WAYS
def test_a_copy_made_inside_has_a_part_of_its_own(way):
    learn = learner()
    with getattr(learn, way)():
        copied = deepcopy(learn)
        watch = next(cb for cb in copied.cbs if isinstance(cb, WatchFrozen))
        assert watch.part.learn is copied and watch.part.cut.before[0] is copied.model[0]
        watch.part.check()
        copied.model[0][0].weight.data.add_(1)
        with pytest.raises(RuntimeError):
            watch.part.check()
        next(cb for cb in learn.cbs if isinstance(cb, WatchFrozen)).part.check()


def without_callback():
    "A body without batch norm, frozen by fastai alone after it has trained"
    model = nn.Sequential(nn.Sequential(conv(3), nn.ReLU()), dropout_head())
    learn = make_learner(model=model, splitter=lambda m: [params(m[0]), params(m[1])], wd=0.1)
    learn.fit(1, 0.1)
    learn.freeze()
    return learn


@WAYS
def test_gradients_from_before_the_freeze_move_nothing(way):
    learn = without_callback()
    before = bits(learn.model[0].parameters())
    with getattr(learn, way)():
        learn.fit(2, 0.1)
        recorded = learn.recorder.values[-1][1]
    assert same(before, learn.model[0].parameters())
    assert learn.validate()[0] == pytest.approx(recorded, rel=1e-4)


class Writes(Callback):
    def after_batch(self):
        if self.training:
            self.model[0][0].weight.data.mul_(1.1)


def unverified():
    learn = learner()
    active_callback(learn).verify = False
    return learn


@WAYS
@pytest.mark.parametrize('make', [without_callback, unverified])
def test_who_writes_within_a_fit_is_seen_if_no_callback_looks(way, make):
    learn = make()
    with getattr(learn, way)(), pytest.raises(RuntimeError, match='something writes to it'):
        learn.fit(2, cbs=Writes())
