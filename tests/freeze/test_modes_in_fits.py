"Every mode through every event of a Learner's life, with four optimizers and weight decay: what is fixed stays bitwise as it was"

import fastai.callback.fp16, fastai.callback.schedule  # patch Learner
import pytest, torch.nn.functional as F
import torch
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from learners import make_learner, OPTIMIZERS

from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.layers import bn_layers, MODES


class Trains(Callback):
    "Calls `.train()` wherever it can, before every forward pass"

    order = 1000

    def before_fit(self):
        self.learn.model.train()

    def before_batch(self):
        self.learn.model.train()

    def after_pred(self):
        self.learn.model.train()

    def before_validate(self):
        self.learn.model.train()


class Nests(Callback):
    "Validates and predicts between two training batches, then goes on training"

    def after_batch(self):
        if not self.training or self.train_iter != 2:
            return
        dl, iteration = self.dl, self.train_iter
        self.learn.validate()
        self.learn.get_preds(ds_idx=1)
        self.learn.model.train()
        self.learn.training, self.learn.dl, self.learn.train_iter, self.learn.n_iter = True, dl, iteration, len(dl)


class Fails(Callback):
    order = 1000

    def __init__(self, error, event):
        self.error = error
        setattr(self, event, self.fail)

    def fail(self):
        if self.training:
            raise self.error


def fails(error, event):
    def act(learn):
        with pytest.raises(type(error)):
            learn.fit(1, cbs=Fails(error, event))
        return learn

    return act


def fit(**kwargs):
    return lambda learn: learn.fit(2, **kwargs) or learn


def with_cb(make):
    return lambda learn: learn.fit(2, cbs=make()) or learn


def save_load(learn):
    learn.save('here')
    learn.fit(2)
    return learn.load('here')


def save_load_without_opt(learn):
    learn.fit(1)
    learn.save('here', with_opt=False)
    return learn.load('here')


def export_load(learn):
    learn.export('e.pkl')
    learn.fit(1)
    loaded = load_learner('e.pkl')
    loaded.dls = learn.dls
    return loaded


def create_opt(learn):
    learn.create_opt()
    return learn


def lr_find(learn):
    learn.lr_find(num_it=6, show_plot=False)
    return learn


def freeze_again(learn):
    learn.freeze()
    return learn


def removed_and_added(learn):
    cb = active_callback(learn)
    learn.remove_cb(cb)
    learn.add_cb(cb)
    return learn


EVENTS = dict(
    epochs=fit(),
    one_cycle=lambda learn: learn.fit_one_cycle(2) or learn,
    reset_opt=fit(reset_opt=True),
    create_opt=create_opt,
    train_calls=with_cb(Trains),
    nested_validation=with_cb(Nests),
    accumulation=with_cb(lambda: GradientAccumulation(16)),
    clipping=with_cb(lambda: GradientClip(0.1)),
    bf16=lambda learn: fit()(learn.to_bf16()),
    fp16=lambda learn: fit()(learn.to_fp16()),
    lr_find=lr_find,
    save_load=save_load,
    save_load_without_opt=save_load_without_opt,
    export_load=export_load,
    freeze_again=freeze_again,
    removed_and_added=removed_and_added,
    error_in_step=fails(ZeroDivisionError(''), 'before_step'),
    interrupt=fails(KeyboardInterrupt(), 'after_pred'),
    interrupt_after_step=fails(KeyboardInterrupt(), 'after_step'),
    error_in_batch=fails(RuntimeError(''), 'before_batch'),
    validate=lambda learn: learn.validate() and learn,
    get_preds=lambda learn: learn.get_preds() and learn,
)


@pytest.mark.guarantee(1)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('event', EVENTS)
@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.filterwarnings('ignore')
def test_mode_survives(opt, event, mode):
    learn = make_learner(opt_func=OPTIMIZERS[opt])
    learn.fit(1)  # gives every parameter a gradient and an optimizer state to drift by
    learn.freeze_to_bn(-1, bn=mode)
    learn.fit(1)
    body = Body(learn.model[0])
    learn = EVENTS[event](learn)
    assert not body.moved(learn.model[0]) - may_move(mode)
    learn.fit(2)
    assert body.moved(learn.model[0]) == may_move(mode)
    assert not any(l._forward_pre_hooks or l._forward_hooks for l in bn_layers(learn.model))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('train_bn', [True, False])
def test_fine_tune(mode, train_bn):
    "`fine_tune` unfreezes half-way: the policy's `bn_above` holds from there"
    learn = make_learner(train_bn=train_bn).freeze_to_bn(-1, bn='train', bn_above={'0.*': mode, '*': 'train'})
    learn.fit(1)
    learn.freeze_to_bn(-1, bn=mode)
    body, stages = Body(learn.model[0]), []

    class Stages(Callback):
        def after_fit(self):
            stages.append(body.moved())

    learn.add_cb(Stages())
    learn.fine_tune(2)
    assert stages == [may_move(mode), may_move(mode) | {'others'}]


@pytest.mark.parametrize('train_bn', [True, False])
def test_plain_freezing_methods_honour_the_policy(train_bn):
    learn = make_learner(train_bn=train_bn, cbs=BatchNormFreeze('stats-only', {'0.*': 'affine-only'}))
    learn.fit(1)
    for act, expected in [(learn.freeze, {'stats'}), (learn.unfreeze, {'affine', 'others'}), (lambda: learn.freeze_to(-1), {'stats'})]:
        act()
        body = Body(learn.model[0])
        learn.fit(1)
        assert body.moved() == expected


@pytest.mark.parametrize('mode', MODES)
def test_normalisation_follows_the_statistics_half(mode):
    "A held layer normalises a training batch with the running statistics, the others with the batch"
    learn, seen = make_learner(), []
    learn.fit(1)
    learn.freeze_to_bn(-1, bn=mode)

    def look(l, args, out):
        if learn.training:
            seen.append(torch.equal(out, F.batch_norm(args[0], l.running_mean, l.running_var, l.weight, l.bias)))

    learn.model[0][1].register_forward_hook(look)
    learn.fit(1)
    assert seen == [not MODES[mode].updates_stats] * 3
