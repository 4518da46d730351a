"""Each fault of fastai 2.8.12 that concerns freezing: fastai's own `freeze` or `BnFreeze` shows it, `BatchNormFreeze` does not.

The first half of each test is about fastai. Should one fail, fastai has changed: good news, and the documentation needs mending."""

import fastai.callback.schedule
import pytest, torch
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze, set_bn_eval
from fastai.torch_core import norm_types, trainable_params
from fastai.vision.gan import set_freeze_model
from learners import bits, body_and_head, make_learner, OPTIMIZERS, same
from torch import nn

from bnfreeze_fastai.core import hold_bn_mode
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import MODES

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:load_learner')


def with_bnfreeze(**kwargs):
    learn = make_learner(cbs=BnFreeze(), **kwargs)
    learn.freeze()
    return learn


def with_ours(**kwargs):
    return make_learner(**kwargs).freeze_to_bn(-1)


def moved_in(learn, act=lambda learn: learn.fit(2)):
    body = Body(learn.model[0])
    act(learn)
    return body.moved()


def test_bnfreeze_does_nothing_under_the_defaults():
    assert moved_in(with_bnfreeze()) == {'stats', 'affine'}
    assert moved_in(with_ours()) == set()


def test_bnfreeze_in_fine_tune_trains_every_batch():
    def flags(learn):
        seen = []
        learn.model[0][1].register_forward_pre_hook(lambda l, args: seen.append(l.training) if learn.training else None)
        learn.fine_tune(1)
        return seen

    assert all(flags(make_learner(cbs=BnFreeze())))
    assert moved_in(make_learner(cbs=BatchNormFreeze(bn_above='affine-only')), lambda learn: learn.fine_tune(1)) == {'affine', 'others'}


def test_without_train_bn_statistics_move_all_the_same():
    learn = make_learner(train_bn=False)
    learn.freeze()
    assert moved_in(learn) == {'stats'}
    assert moved_in(with_ours(train_bn=False)) == set()


def test_bnfreeze_ends_with_unfreeze_and_has_no_affine_only():
    learn = with_bnfreeze(train_bn=False)
    learn.unfreeze()
    assert moved_in(learn) == {'stats', 'affine', 'others'}
    learn = make_learner(train_bn=False).freeze_to_bn(-1, bn_above='affine-only')
    learn.unfreeze()
    assert moved_in(learn) == {'affine', 'others'}


def test_a_layer_without_weights_stops_bnfreeze():
    model = lambda: body_and_head(norm=lambda n: nn.BatchNorm2d(n, affine=False))
    with pytest.raises(StopIteration):
        set_bn_eval(model())
    assert moved_in(with_ours(model=model())) == set()


def test_a_batch_norm_as_the_model_is_overlooked():
    class Root(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).mean((2, 3))

    root = Root(3).requires_grad_(False)
    set_bn_eval(root)
    assert root.training
    learn = make_learner(model=Root(3), splitter=trainable_params).freeze_to_bn(0, bn_above='affine-only')
    before = bits(learn.model.buffers())
    learn.fit(1)
    assert same(before, learn.model.buffers())


def test_bnfreeze_looks_at_the_first_parameter_only():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    layer[0].bias.requires_grad_(False)
    set_bn_eval(layer)
    assert layer[0].training
    with hold_bn_mode(layer, 'frozen'):
        assert not any(p.requires_grad for p in layer.parameters())


def test_converted_layers_escape():
    assert not issubclass(nn.SyncBatchNorm, norm_types) and not issubclass(nn.GroupNorm, norm_types)
    sync = nn.Sequential(nn.SyncBatchNorm(3).requires_grad_(False))
    set_bn_eval(sync)
    assert sync[0].training

    class Converts(Callback):
        "As `DistributedTrainer` does"

        order = 11

        def before_fit(self):
            self.learn.model[0] = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model[0])

    learn = with_ours()
    learn.add_cb(Converts())
    assert moved_in(learn) == set() and isinstance(learn.model[0][1], nn.SyncBatchNorm)


def test_a_later_train_call_undoes_bnfreeze():
    class LikeGan(Callback):
        def before_batch(self):
            set_freeze_model(self.learn.model[1], True) or self.learn.model.train()

    learn = with_bnfreeze(train_bn=False)
    learn.add_cb(LikeGan())
    assert moved_in(learn) == {'stats'}
    learn = with_ours()
    learn.add_cb(LikeGan())
    assert moved_in(learn) == set()


@pytest.mark.parametrize('opt', ['adam', 'ranger'])
def test_what_was_trained_drifts_once_frozen(opt):
    for make, expected in (
        (lambda **kw: make_learner(cbs=BnFreeze(), train_bn=False, wd_bn_bias=True, **kw), {'affine', 'others'}),
        (lambda **kw: make_learner(cbs=BatchNormFreeze(), wd_bn_bias=True, **kw), set()),
    ):
        learn = make(opt_func=OPTIMIZERS[opt])
        learn.fit(1)
        learn.freeze()
        assert moved_in(learn) == expected


def test_slow_weights_left_behind_by_a_load_move_what_is_frozen():
    for make, expected in (
        (lambda **kw: make_learner(train_bn=False, **kw), {'others', 'affine', 'stats'}),
        (lambda **kw: make_learner(cbs=BatchNormFreeze(), **kw), set()),
    ):
        learn = make(opt_func=OPTIMIZERS['ranger'])
        learn.fit(1)
        learn.save('early', with_opt=False)
        learn.freeze()
        learn.fit(3)
        with torch.no_grad():
            [p.add_(0.1) for p in learn.model.parameters()]
        learn.save('moved', with_opt=False)
        learn.load('moved', with_opt=False)
        assert moved_in(learn, lambda learn: learn.fit(3)) == expected


def test_create_opt_forgets_the_freeze_point():
    learn = make_learner(train_bn=False)
    learn.freeze()
    learn.create_opt()
    assert learn.opt.frozen_idx == 0 and not learn.model[0][0].weight.requires_grad
    learn = with_ours()
    learn.create_opt()
    assert moved_in(learn) == set() and learn.bn_summary().df['mode'].tolist() == ['frozen', 'frozen', 'train']


def test_export_after_freezing_fails_with_the_default_splitter():
    def exported(cbs):
        learn = make_learner(splitter=trainable_params, cbs=cbs)
        learn.create_opt()
        with pytest.warns(UserWarning, match='whole model is frozen'):
            learn.freeze_to(1)
        learn.export('e.pkl')
        return learn

    with pytest.raises(AssertionError):
        exported(None)
    learn = exported(BatchNormFreeze())
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters()))


def test_layer_norm_trains_and_group_norm_does_not():
    for norm, expected in ((lambda n: nn.GroupNorm(1, n), set()), (lambda n: nn.InstanceNorm2d(n, affine=True), {'affine'})):
        model = body_and_head(norm)
        learn = make_learner(model=model)
        learn.freeze()
        assert moved_in(learn) == expected
        for mode in MODES:
            assert moved_in(make_learner(model=body_and_head(norm)).freeze_to_bn(-1, bn=mode)) == may_move(mode) & {'affine'}
