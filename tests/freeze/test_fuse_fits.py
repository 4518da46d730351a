"`learn.fuse_bn()`: fits that run convolution and batch norm on fixed statistics as one"

import pickle
import warnings
from contextlib import nullcontext
from copy import deepcopy

import pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.learner import load_learner
from fastai.torch_core import params, set_seed
from fastcore.basics import noop
from learners import make_learner, OPTIMIZERS
from torch import nn
from torch.nn.parallel import DataParallel
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.freeze.fuse import BatchNormFuse

pytestmark = [pytest.mark.usefixtures('fused_at_any_size'), pytest.mark.filterwarnings('ignore:The running statistics')]


def pretrained(opt='sgd', **kwargs):
    "All of the small network trained for an epoch, then held on its statistics"
    learn = make_learner(opt_func=OPTIMIZERS[opt], **kwargs)
    learn.fit(1)
    return learn.freeze_to_bn(0, bn_above='affine-only')


def state(learn):
    return {n: t.detach().clone() for n, t in learn.model.state_dict().items()}


def assert_close(learn, other, tol=1e-3):
    for (n, t), u in zip(learn.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(t, u, rtol=tol, atol=tol, msg=lambda m: f'{n}: {m}')
    torch.testing.assert_close(torch.stack(learn.recorder.losses), torch.stack(other.recorder.losses), rtol=tol, atol=tol)


def stand_ins(model):
    return [n for n, m in model.named_modules() if 'forward' in vars(m)]


FITS = {
    'fit': lambda learn: learn.fit(2, 1e-2),
    'one cycle': lambda learn: learn.fit_one_cycle(2, 1e-2),
    'head, then all': lambda learn: learn.freeze_to_bn(-1, bn_above='affine-only').fine_tune(1, 1e-2),
    'frozen above': lambda learn: learn.freeze_to_bn(0, bn_above='frozen').fit(2, 1e-2),
    'two modes': lambda learn: learn.freeze_to_bn(0, bn_above={'0.1': 'affine-only', '*': 'train'}).fit(2, 1e-2),
    'frozen below': lambda learn: learn.freeze_to_bn(-1).fit(2, 1e-2),
    'gradients accumulated': lambda learn: learn.fit(2, 1e-2, cbs=GradientAccumulation(16)),
    'mixup': lambda learn: learn.fit(2, 1e-2, cbs=MixUp()),
    'activations watched': lambda learn: learn.fit(2, 1e-2, cbs=ActivationStats(modules=[learn.model[0][0]])),
    'fastai': lambda learn: (learn.remove_cb(BatchNormFreeze), learn.fit(2, 1e-2)),
}


@pytest.mark.filterwarnings('ignore:There was nothing to fuse')
@pytest.mark.parametrize('name', FITS)
def test_a_fit_gives_what_it_gave(name):
    learns = [pretrained(), pretrained()]
    for learn in learns:
        if learn is learns[1]:
            assert learn.fuse_bn() is learn
        set_seed(1)
        learn.dls.train.rng.seed(1)
        FITS[name](learn)
        assert not stand_ins(learn.model)
    assert_close(*learns)
    n = {'two modes': 1, 'frozen below': 0, 'activations watched': 1, 'fastai': 0}.get(name, 2)
    assert len(learns[1].batch_norm_fuse.pairs) == n


@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_what_is_fixed_stays_bitwise(opt):
    learn = pretrained(opt).freeze_to_bn(0, bn_above='frozen').fuse_bn()
    before = {n: t.clone() for n, t in learn.model.state_dict().items() if n.startswith(('0.1', '0.4', '1.2'))}
    learn.fit(2)
    assert before and all(torch.equal(learn.model.state_dict()[n], t) for n, t in before.items())
    assert learn.batch_norm_fuse.pairs.batch_norm.tolist() == ['0.1', '0.4']


def test_types_and_identities():
    learn = pretrained()
    modules, tensors = [(n, id(m), type(m)) for n, m in learn.model.named_modules()], [id(p) for p in learn.model.parameters()]
    opt = learn.opt
    seen = []

    class LooksAround(Callback):
        def after_pred(self):
            seen.append(type(self.pred))
            assert [(n, id(m), type(m)) for n, m in self.model.named_modules()] == modules
            assert [id(p) for p in self.model.parameters()] == tensors and self.opt is opt

    learn.fuse_bn().fit(1, cbs=LooksAround())
    assert seen and set(seen) == {torch.Tensor}


def test_validation_and_prediction_are_untouched():
    learn = pretrained()
    plain, loss = learn.get_preds()[0], learn.validate()
    learn.fuse_bn()
    assert torch.equal(learn.get_preds()[0], plain) and learn.validate() == loss

    class LooksAtValidation(Callback):
        def before_validate(self):
            assert not stand_ins(self.model)

    learn.fit(1, cbs=LooksAtValidation())


@pytest.mark.parametrize(
    'error', [ZeroDivisionError, KeyboardInterrupt, CancelBatchException, CancelTrainException, CancelEpochException, CancelFitException]
)
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward', 'after_step'])
def test_ways_out(event, error):
    learn = pretrained().fuse_bn()

    def leave(cb):
        if cb.training:
            raise error('this is on purpose')

    leaves = type('Leaves', (Callback,), {event: lambda self: leave(self)})()
    cancels = error.__name__.startswith('Cancel')
    before = {n: id(t) for n, t in learn.model.state_dict(keep_vars=True).items()}
    try:
        learn.fit(1, cbs=leaves)
    except (ZeroDivisionError, KeyboardInterrupt):
        assert not cancels
    if cancels:
        assert not stand_ins(learn.model)
    learn.fit(1)
    assert not stand_ins(learn.model) and len(learn.batch_norm_fuse.pairs) == 2
    assert before == {n: id(t) for n, t in learn.model.state_dict(keep_vars=True).items()}


def test_removing_the_callback_after_an_error_leaves_nothing():
    learn = pretrained().fuse_bn()

    class Interrupts(Callback):
        def after_loss(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupts())
    assert stand_ins(learn.model)
    learn.remove_cb(BatchNormFuse)
    assert not stand_ins(learn.model)
    assert not learn.model._forward_hooks and not learn.model._forward_pre_hooks


def test_removed_inside_a_fit():
    learn = pretrained().fuse_bn()

    class Removes(Callback):
        def after_batch(self):
            if self.training and hasattr(self.learn, 'batch_norm_fuse'):
                self.learn.remove_cb(BatchNormFuse)
                assert not stand_ins(self.model)

    learn.fit(2, cbs=Removes())
    assert not any(isinstance(cb, BatchNormFuse) for cb in learn.cbs)


def test_given_to_one_fit_it_goes_before():
    learn = pretrained()
    learn.fit(1, cbs=(cb := BatchNormFuse()))
    assert len(cb.pairs) == 2 and not any(isinstance(cb, BatchNormFuse) for cb in learn.cbs)
    own, given = learn.fuse_bn().batch_norm_fuse, BatchNormFuse()
    learn.fit(1, cbs=given)
    assert own.pairs.empty and len(given.pairs) == 2
    learn.fit(1)
    assert len(own.pairs) == 2


def test_twice_is_once():
    learn = pretrained().fuse_bn().fuse_bn()
    assert sum(isinstance(cb, BatchNormFuse) for cb in learn.cbs) == 1


def test_nothing_to_fuse_is_told():
    learn = make_learner().fuse_bn()
    with pytest.warns(UserWarning, match='every batch norm layer was on the statistics of the batch.*affine-only'):
        learn.fit(1)
    with pytest.warns(UserWarning) as told:  # a head that trains on a frozen body is no mistake
        learn.freeze_to_bn(-1).fit(1)
        warnings.warn('at least this')
    assert not [w for w in told if 'nothing to fuse' in str(w.message)]


def fit_told(model, mode, **kwargs):
    "What a fused fit of all of `model` on statistics as in `mode` says there is not to fuse"
    learn = make_learner(model, **kwargs)
    learn.freeze_to_bn(0, bn_above=mode).fuse_bn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.fit(1)
    return [str(w.message) for w in caught if 'to fuse' in str(w.message)]


def net(*between, norm=lambda: nn.BatchNorm2d(4)):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *between, norm(), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))


def norm_first():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


NO_STATS, NO_PAIR = 'no batch norm layer of PyTorch', 'no batch norm on fixed statistics could run as one'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('mode', ['affine-only', 'frozen'])
@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: net(norm=nn.Identity), NO_STATS),
        (lambda: net(norm=lambda: nn.GroupNorm(2, 4)), NO_STATS),
        (lambda: net(norm=lambda: nn.InstanceNorm2d(4)), NO_STATS),
        (lambda: net(norm=lambda: nn.InstanceNorm2d(4, track_running_stats=True)), NO_STATS),
        (lambda: net(norm=lambda: FrozenBatchNorm2d(4)), NO_STATS),
        (lambda: net(norm=lambda: nn.BatchNorm2d(4, track_running_stats=False)), NO_STATS),
        (lambda: net(nn.ReLU()), NO_PAIR),
        (lambda: net(nn.Dropout(0.1)), NO_PAIR),
        (norm_first, NO_PAIR),
    ],
)
def test_what_is_told_of_nothing_to_fuse_is_true(make, said, mode):
    (told,) = fit_told(make(), mode)
    assert said in told and 'of the batch' not in told


@pytest.mark.filterwarnings('ignore')
def test_without_batch_norm_the_statistics_of_the_batch_are_no_reason():
    (told,) = fit_told(net(norm=nn.Identity), 'train')
    assert NO_STATS in told
    assert not fit_told(net(), 'affine-only')
    (told,) = fit_told(net(), 'train')
    assert 'on the statistics of the batch' in told


def test_an_epoch_without_a_batch_tells_of_nothing():
    class NoBatch(Callback):
        def before_batch(self):
            if self.training:
                raise CancelTrainException

    learn = make_learner(net(nn.ReLU())).freeze_to_bn(0, bn_above='affine-only').fuse_bn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.fit(1, cbs=NoBatch())
    assert not [w for w in caught if 'to fuse' in str(w.message)]


def test_bn_freeze_of_fastai_is_fused_too():
    learn = make_learner(train_bn=False)
    learn.fit(1)
    learn.freeze()
    for p in learn.model[0][0].parameters():
        p.requires_grad = True  # a convolution that trains in the frozen part
    learn.fuse_bn().fit(1, cbs=BnFreeze())
    assert '0.1' in learn.batch_norm_fuse.pairs.batch_norm.tolist()


def test_a_mode_switched_inside_a_fit():
    class Switches(Callback):
        def before_epoch(self):
            if self.epoch == 1:
                self.learn.freeze_to_bn(0, bn_above='train')

    learns = [pretrained(), pretrained().fuse_bn()]
    for learn in learns:
        learn.dls.train.rng.seed(1)
        with pytest.warns(UserWarning) if learn is learns[1] else nullcontext():
            learn.fit(2, 1e-2, cbs=Switches())
    assert_close(*learns)
    assert learns[1].batch_norm_fuse.pairs.empty


def test_lr_find():
    learn = pretrained().fuse_bn()
    before = state(learn)
    with learn.no_bar():
        learn.lr_find(num_it=15, show_plot=False)
    assert all(torch.equal(t, before[n]) for n, t in state(learn).items()) and not stand_ins(learn.model)


def test_export_load_and_copies(tmp_path):
    learn = pretrained().fuse_bn()
    copies = []

    class Copies(Callback):
        def after_loss(self):
            copies.extend([deepcopy(self.model), pickle.loads(pickle.dumps(self.model))])

    x = learn.dls.one_batch()[0]
    learn.fit(1, cbs=Copies())
    for model in copies:
        assert type(model.train()(x)) is torch.Tensor
        with torch.no_grad():
            model.eval()(x)
        model.train()(x).sum().backward()
    learn.export(tmp_path / 'learn.pkl')
    loaded = load_learner(tmp_path / 'learn.pkl')
    assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x)) and len(loaded.batch_norm_fuse.pairs) == 2
    loaded.dls = learn.dls
    loaded.logger = noop
    loaded.freeze_to_bn(0)
    loaded.fit(1)
    assert len(loaded.batch_norm_fuse.pairs) == 2


def deeper():
    "What is frozen, what trains on fixed statistics, the head"
    set_seed(0)
    layer = lambda n: [nn.Conv2d(n, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return nn.Sequential(nn.Sequential(*layer(3)), nn.Sequential(*layer(4)), head)


@pytest.mark.parametrize('block', ['precompute', 'fold_frozen'])
def test_beside_what_runs_the_frozen_part(block):
    learns = [make_learner(deeper(), splitter=lambda m: [params(l) for l in m], opt_func=OPTIMIZERS['sgd']) for _ in range(2)]
    for learn in learns:
        learn.fit(1)
        learn.freeze_to_bn(1, bn_above='affine-only')
        if learn is learns[1]:
            learn.fuse_bn()
        learn.dls.train.rng.seed(1)
        with getattr(learn, block)():
            learn.fit(2, 1e-2)
    assert_close(*learns)
    assert learns[1].batch_norm_fuse.pairs.batch_norm.tolist() == ['1.1']


def test_what_cannot_be_fused_is_refused_before_anything_changes():
    learn = make_learner()
    learn.model.compile()
    with pytest.raises(ValueError, match='compiled.*without fusion'):
        learn.fuse_bn()
    assert not any(isinstance(cb, BatchNormFuse) for cb in learn.cbs)
    with pytest.raises(ValueError, match='compiled.*without fusion'):
        learn.fit(1, cbs=BatchNormFuse())
    learn = make_learner()
    learn.model = DataParallel(learn.model)
    learn.model.device_ids = [0, 1]  # as where there are two
    with pytest.raises(ValueError, match='DistributedDataParallel'):
        learn.fuse_bn()


def test_modules_added_by_another_callback_are_fused_from_the_next_epoch_on():
    class Adds(Callback):
        def after_train(self):
            if self.epoch == 0:
                layer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
                layer[1].momentum = None
                layer.train()(torch.randn(8, 4, 2, 2))
                self.model[0].append(layer)

    learn = pretrained().fuse_bn()
    learn.fit(2, cbs=Adds())
    assert learn.batch_norm_fuse.pairs.convolution.tolist() == ['0.0', '0.3', '0.6.0']
