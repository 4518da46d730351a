"`learn.bn_check`: each finding where it is true, as a fit shows, and none where nothing hurts; nothing changes on any way out"

import random
from copy import deepcopy
from functools import partial

import numpy as np, pandas as pd, pytest, timm, torch, torchvision
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.data import PartialDL
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed, trainable_params
from fastai.vision.learner import vision_learner
from fastcore.basics import noop
from learners import bits, body_and_head, make_dls, make_learner, OPTIMIZERS, pretrained, same, two_groups
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader as TorchLoader, IterableDataset, RandomSampler, TensorDataset

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.freeze.recalibrate import BatchNormRecalibrate
from bnfreeze_fastai.layers import bn_layers, norm_layers
from bnfreeze_fastai.stats.momentum import set_bn_momentum

one_group = lambda m: list(m.parameters())


def whats(learn, epochs=None):
    "What is found, in short: the words of each finding without figures and names"
    return [f.what for f in learn.bn_check(epochs).findings]


def finding(learn, word, epochs=None):
    "The one finding that has `word`"
    (found,) = [f for f in learn.bn_check(epochs).findings if word in f.what]
    assert found.severity in ('error', 'warning', 'note') and found.why and found.remedy
    return found


def healthy(n=64, bs=32, model=None, **kwargs):
    "A Learner with trained statistics and batches that are large enough"
    if model is None:
        model = body_and_head()
        for i in range(30):
            model(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)))
    learn = make_learner(model, **kwargs)
    learn.dls = make_dls(n, bs)
    return learn


def train(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)


# Quiet where nothing hurts


@pytest.mark.parametrize('arch', [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small, 'efficientnet_b0'])
def test_a_pretrained_vision_learner_has_two_lines(arch):
    set_seed(0)
    ds = [(torch.randn(3, 64, 64), i % 2) for i in range(64)]
    dls = DataLoaders.from_dsets(ds, ds, bs=32, num_workers=0)
    learn = vision_learner(dls, arch, n_out=2, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat())
    for layer in bn_layers(learn.model[0]):  # as if pretrained
        layer.running_mean.normal_(std=0.1)
        layer.num_batches_tracked.fill_(1000)
    learn.freeze_to_bn(-1)
    assert whats(learn) == []
    assert str(learn.bn_check()).splitlines()[1:] == ['Nothing found that will hurt batch norm.']


@pytest.mark.parametrize('opt', ['adam', 'sgd', 'ranger'])
def test_plain_learners_without_a_freeze(opt):
    learn = healthy(opt_func=OPTIMIZERS[opt])
    assert whats(learn) == []
    train(learn, 1)
    assert whats(learn) == []


@pytest.mark.parametrize(
    'policy',
    [
        BatchNormFreeze,
        partial(BatchNormFreeze, 'affine-only', 'affine-only'),
        partial(BatchNormFreeze, 'stats-only', 'stats-only'),
        partial(BatchNormFreeze, 'train'),
        partial(BatchNormFreeze, schedule={0.5: dict(bn_above='affine-only')}),
    ],
)
def test_a_policy_is_a_choice(policy):
    learn = healthy(cbs=policy())
    learn.freeze()
    assert whats(learn) == []


def test_mixed_precision_and_the_like_are_no_finding():
    learn = healthy().to_fp16()
    assert whats(learn) == []
    assert whats(healthy(model=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), splitter=one_group)) == []
    assert 'no batch norm' in healthy(model=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), splitter=one_group).bn_check().title


@pytest.mark.parametrize(
    'norm', [partial(nn.GroupNorm, 1), nn.InstanceNorm2d, torchvision.ops.FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d]
)
def test_other_norm_layers(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert whats(healthy(model=model, splitter=one_group, wd_bn_bias=False)) == []


# Batches

KINDS = {
    '1d': (nn.BatchNorm1d, (3,)),
    '2d': (nn.BatchNorm2d, (3, 1, 1)),
    '3d': (nn.BatchNorm3d, (3, 1, 1, 1)),
    'timm': (timm.layers.BatchNormAct2d, (3, 1, 1)),
    'no affine': (partial(nn.BatchNorm2d, affine=False), (3, 1, 1)),
    'no statistics': (partial(nn.BatchNorm2d, track_running_stats=False), (3, 1, 1)),
}


def of_shape(norm, shape, n=2, bs=1, drop_last=False):
    ds = [(torch.randn(shape), i % 2) for i in range(n)]
    dls = DataLoaders(*[DataLoader(ds, bs=bs, drop_last=drop_last)] * 2)
    model = nn.Sequential(norm(3), nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 2))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize('kind', KINDS)
def test_one_value_per_channel_is_what_torch_refuses(kind):
    learn = of_shape(*KINDS[kind])
    found = finding(learn, 'one value per channel')
    assert (found.severity, found.layers) == ('error', ('0',))
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        train(learn, 1)
    learn = of_shape(*KINDS[kind], bs=2)
    assert 'one value per channel in a training batch' not in whats(learn)
    train(learn, 1)


def test_one_value_of_instance_norm():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(), nn.Linear(3, 2))
    learn = healthy(model=model, splitter=one_group)
    assert finding(learn, 'one value per channel').layers == ('1',)
    with pytest.raises(ValueError, match='Expected more than 1 spatial element'):
        train(learn, 1)


@pytest.mark.parametrize('kind', ['1d', '2d', 'no statistics'])
@pytest.mark.parametrize('drop_last', [True, False])
def test_a_last_batch_of_one(kind, drop_last):
    norm, shape = KINDS[kind]
    learn = of_shape(norm, shape, n=33, bs=16, drop_last=drop_last)
    assert ('a last batch of 1 sample, one value per channel' in whats(learn)) == (not drop_last)
    if drop_last:
        return train(learn, 1)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        train(learn, 1)


@pytest.mark.parametrize('n,bs', [(9, 2), (10, 3)])
def test_a_last_batch_of_one_where_all_are_small(n, bs):
    learn = of_shape(*KINDS['1d'], n=n, bs=bs)
    assert finding(learn, 'last batch of 1').severity == 'error'
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        train(learn, 1)
    learn = of_shape(nn.BatchNorm2d, (3, 8, 8), n=n, bs=bs)  # small batches are told anyway
    assert not any('last batch' in w for w in whats(learn))


@pytest.mark.parametrize('n,severity', [(33, 'warning'), (35, 'warning'), (36, None), (48, None)])
def test_a_small_last_batch_where_each_image_has_many_values(n, severity):
    learn = of_shape(nn.BatchNorm2d, (3, 8, 8), n=n, bs=16)
    assert [f.severity for f in learn.bn_check().findings] == [severity] * (severity is not None)
    train(learn, 1)


def test_the_last_batch_of_a_loader_of_torch():
    learn = healthy()
    ds = TensorDataset(torch.randn(33, 3, 8, 8), torch.zeros(33).long())
    loaders = lambda **kwargs: DataLoaders(*[TorchLoader(ds, 16, **kwargs)] * 2)
    learn.dls = loaders()
    assert finding(learn, 'last batch').layers == ('1.2',)
    for kwargs in (dict(drop_last=True), dict(num_workers=1, persistent_workers=True, drop_last=True, shuffle=True)):
        learn.dls = loaders(**kwargs)
        assert whats(learn) == []


class Odd(BatchSampler):
    "Batches of other sizes than it says"


ONE_LEFT = {
    'a batch sampler': lambda: TorchLoader(images(33), batch_sampler=BatchSampler(RandomSampler(range(33)), 16, False)),
    'one that drops it': lambda: TorchLoader(images(33), batch_sampler=BatchSampler(range(33), 16, True)),
    'one of another sort': lambda: TorchLoader(images(33), batch_sampler=Odd(range(32), 16, False)),
    'a part of the samples': lambda: PartialDL([*images(64)], bs=16, partial_n=33),
    'a part without rest': lambda: PartialDL([*images(65)], bs=16, partial_n=32),
    'all of them': lambda: PartialDL([*images(33)], bs=16),
}


def images(n):
    return TensorDataset(torch.randn(n, 3, 8, 8), torch.arange(n) % 2)


@pytest.mark.parametrize('kind', ONE_LEFT)
def test_a_last_batch_of_one_in_loaders_of_every_sort(kind):
    learn = healthy()
    dl = ONE_LEFT[kind]()
    learn.dls = DataLoaders(dl, make_dls(32, 16)[0])
    one = [len(b[0]) for b in dl][-1] == 1
    assert one == any('last batch of 1' in w for w in whats(learn))


@pytest.mark.parametrize('bs,small', [(4, True), (15, True), (16, False), (32, False)])
def test_small_batches_name_the_layer_with_the_fewest_values_first(bs, small):
    found = [f for f in healthy(bs=bs, n=2 * bs).bn_check().findings if f.what.startswith('small batches')]
    assert bool(found) == small
    if small:
        assert found[0].layers == ('1.2', '0.4', '0.1') and f'{bs} samples, {bs} values per channel in 1.2' in found[0].what


def test_small_batches_hurt_no_layer_that_is_held():
    learn = healthy(bs=4).freeze_to_bn(-1)
    assert finding(learn, 'small batches').layers == ('1.2',)
    assert whats(healthy(bs=4).freeze_to_bn(-1, bn_above='affine-only')) == []


def test_a_layer_that_sees_fewer_samples_than_the_loader_gives():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.out = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            few = self.bn(x.mean((2, 3))[:8])
            return self.out(few.repeat(len(x) // 8, 1))

    assert '32 samples, 8 values per channel in bn' in finding(healthy(model=Pairs(), splitter=one_group), 'small batches').what


@pytest.mark.parametrize('fewest_first', [False, True])
def test_values_of_a_shared_layer_are_its_fewest(fewest_first):
    bn, pool = nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1)
    calls = [pool, bn, nn.Upsample(scale_factor=4), bn, pool] if fewest_first else [bn, pool, bn]
    learn = healthy(model=nn.Sequential(*calls, nn.Flatten(), nn.Linear(3, 2)), bs=8, splitter=one_group)
    assert '8 samples, 8 values per channel in ' in finding(learn, 'small batches').what


def test_devices_that_share_a_batch():
    model = nn.DataParallel(healthy().model)
    assert whats(healthy(model=model, splitter=one_group)) == []  # on the CPU there is one device
    model.device_ids = [0, 1, 2, 3]
    found = finding(healthy(model=model, splitter=one_group), '`DataParallel` splits each batch over 4 devices')
    assert found.severity == 'warning' and 'part of 8 samples' in found.why
    assert finding(healthy(n=256, bs=128, model=model, splitter=one_group), '`DataParallel`').severity == 'note'


def test_processes_that_do_not_share_statistics():
    class DistributedTrainer(Callback):
        sync_bn = False

    learn = healthy(bs=8, n=16, cbs=DistributedTrainer())
    assert finding(learn, 'each process').layers == ('0.1', '0.4', '1.2')
    DistributedTrainer.sync_bn = True
    assert not any('each process' in w for w in whats(learn))
    assert whats(healthy(cbs=DistributedTrainer())) == []


@pytest.mark.parametrize('bs', [8, 32])
def test_gradient_accumulation_matters_where_batches_are_small(bs):
    cb = GradientAccumulation(64)
    assert any('accumulated' in w for w in whats(healthy(bs=bs, cbs=cb))) == (bs == 8)
    assert not any('accumulated' in w for w in whats(healthy(bs=bs, cbs=cb).freeze_to_bn(-1, bn_above='frozen')))


# Momentum


def left_after(learn, epochs):
    "What a fit really leaves of a running mean that started at 1000, where that of the data is next to 0"
    layer = learn.model[0][1]
    layer.running_mean.fill_(1000.0)
    train(learn, epochs, lr=0.0)
    return layer.running_mean.mean().item() / 1000


@pytest.mark.parametrize('epochs', [1, 3, 20])
@pytest.mark.parametrize('momentum', [0.1, 0.02, None])
def test_what_lags_is_what_a_fit_leaves(epochs, momentum):
    learn = healthy()
    for layer in bn_layers(learn.model):
        layer.momentum = momentum
    found = [f for f in learn.bn_check(epochs).findings if 'lag' in f.what]
    left = left_after(learn, epochs)
    assert bool(found) == (left > 0.05)
    if found:
        assert f'{left:.0%} is still what it is now after {2 * epochs} steps' in found[0].what


def test_statistics_that_start_from_nothing_weigh_more():
    assert finding(make_learner(), 'lag', 2).severity == 'warning'
    assert finding(healthy(), 'lag', 2).severity == 'note'


def test_the_remedy_for_lag_is_one():
    learn = healthy()
    assert 'half_life=4' in finding(learn, 'lag', 10).remedy
    set_bn_momentum(learn.model, 4)
    assert whats(learn, 10) == []


def test_without_epochs_only_what_is_slow():
    learn = healthy()
    assert '29 steps' in learn.bn_check().title and whats(learn) == []
    set_bn_momentum(learn.model, 100)
    assert finding(learn, 'after 20 steps').severity == 'note'


def accumulated(n_acc, bs, n=64, **kwargs):
    learn = healthy(n=n, bs=bs, cbs=[GradientAccumulation(n_acc), BatchNormFreeze('train', **kwargs)])
    return learn


@pytest.mark.parametrize('n_acc,bs', [(64, 8), (20, 8), (8, 8), (4, 8)])
def test_statistics_that_are_accumulated_move_once_a_step(n_acc, bs):
    for kwargs, each in ((dict(accumulate=True), -(-n_acc // bs)), (dict(), 1)):
        learn = accumulated(n_acc, bs, **kwargs)
        said = finding(learn, 'lag', 1).what
        updates = 8 // each
        assert f'{0.9**updates:.0%} is still' in said and (f'{updates} of which move it' in said) == (each > 1)
        assert left_after(learn, 1) == pytest.approx(0.9**updates, abs=0.01)


@pytest.mark.parametrize('at', [0.1, 0.5])
def test_statistics_that_a_schedule_stops(at):
    learn = healthy(n=640, cbs=BatchNormFreeze('train', schedule={at: dict(bn='affine-only', bn_above='affine-only')}))
    updates = round(40 * at)
    said = [w for w in whats(learn, 2) if 'lag' in w]
    assert [f'{0.9**updates:.0%} is still' in w for w in said] == [True]
    assert left_after(learn, 2) == pytest.approx(0.9**updates, abs=0.01)
    assert not any('lag' in w for w in whats(healthy(n=640, cbs=BatchNormFreeze('train')), 2))


def test_held_statistics_do_not_lag():
    learn = healthy().freeze_to_bn(-1, bn_above='affine-only')
    assert whats(learn, 1) == [] and 'forget' not in learn.bn_check().title


@pytest.mark.parametrize('momentum,word', [(0.0, 'no batch moves, by their momentum'), (0.9, 'of the last batches alone')])
def test_momentum_out_of_bounds(momentum, word):
    learn = healthy()
    learn.model[0][1].momentum = momentum
    assert finding(learn, word).layers == ('0.1',)
    assert 'inf' not in learn.bn_check().title


@pytest.mark.parametrize('bad', [0, -1, 1.5, True, '3', [3], float('nan')])
def test_bad_epochs(bad):
    learn = healthy()
    with pytest.raises(ValueError, match='`epochs` has to be the number of epochs'):
        learn.bn_check(bad)
    assert learn.opt is None


def test_epochs_of_any_integer_type():
    assert whats(healthy(), np.int64(1)) == whats(healthy(), 1) != []


# What is stored


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d])
def test_statistics_that_are_not_finite(value, norm):
    learn = healthy(model=body_and_head(norm), splitter=one_group)
    learn.model[0][1].running_var[1] = value
    assert finding(learn, 'not finite').layers == ('0.1',)
    learn.model[0][1].running_var[1] = 1.0
    assert not any('not finite' in w for w in whats(learn))


def test_held_statistics_that_were_never_trained():
    assert finding(make_learner().freeze_to_bn(-1), 'never trained').layers == ('0.1', '0.4')
    learn = make_learner()
    set_bn_mode(learn.model[1], 'affine-only')
    assert finding(learn, 'never trained').layers == ('1.2',)
    assert not any('never trained' in w for w in whats(make_learner()))


def test_a_mode_without_statistics_to_hold():
    model = body_and_head(partial(nn.BatchNorm2d, track_running_stats=False))
    found = finding(healthy(model=model).freeze_to_bn(-1), 'layers without any')
    assert found.layers == ('0.1', '0.4')
    assert whats(healthy(model=model)) == []


def test_statistics_switched_off():
    learn = healthy()
    learn.model[0][1].track_running_stats = False
    assert finding(learn, 'by `track_running_stats`').layers == ('0.1',)
    assert whats(learn.freeze_to_bn(-1)) == []  # held, training and evaluation use the same


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_stand_still(dtype):
    learn = healthy()
    layer = learn.model[0][1].to(dtype)
    layer.running_mean.fill_(1.0)
    limit = torch.finfo(dtype).eps / 2 / 0.1
    for shift, moves in ((0.9 * limit, False), (3 * limit, True)):
        old = layer.running_mean.clone()
        layer.train()(torch.full((4, 4, 2, 2), 1 + shift, dtype=dtype))
        assert torch.equal(layer.running_mean, old) != moves
    found = finding(learn, 'statistics kept in')
    assert found.layers == ('0.1',) and f'{limit:.1%}' in found.why


def test_dead_channels_matter_where_they_vary_and_are_held():
    learn = healthy().freeze_to_bn(-1)
    learn.model[0][4].running_var[:2] = 1e-9
    found = finding(learn, 'channels with next to no stored variance that vary in your data: 2')
    assert found.layers == ('0.4',)
    with torch.no_grad():
        learn.model[0][3].weight[:2] = 0.0  # what pretraining leaves: nothing arrives there
    assert whats(learn) == []
    learn = healthy()
    learn.model[0][4].running_var[:2] = 1e-9
    assert whats(learn) == []  # not held: training will mend them


def test_input_without_variance():
    learn = healthy()
    ds = [(torch.zeros(3, 8, 8), i % 2) for i in range(64)]
    learn.dls = DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32))
    assert finding(learn, 'next to no variance in any channel').layers[0] == '0.1'


def of_items(*items, model=None):
    learn = healthy() if model is None else healthy(model=model, splitter=one_group)
    learn.dls = DataLoaders(dl := DataLoader([*items] * 32, bs=32), dl)
    return learn


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_batch_that_is_not_finite(value):
    bad = torch.randn(3, 8, 8)
    bad[0, 0, 0] = value
    found = finding(of_items((torch.randn(3, 8, 8), 0), (bad, 1)), 'not finite')
    assert found.severity == 'error' and found.layers == ('0.1', '0.4', '1.2') and 'a training batch' in found.what
    assert not any('no variance' in w for w in whats(of_items((bad, 1))))


class Quiet(nn.Module):
    "As an untrained network for texts, whose signal is small before its first batch norm"

    def __init__(self):
        super().__init__()
        self.words, self.bn, self.out = nn.Embedding(50, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        nn.init.normal_(self.words.weight, std=1e-3)

    def forward(self, x):
        return self.out(self.bn(self.words(x).mean(1)))


def test_a_network_that_is_quiet_is_not_broken():
    learn = of_items(*[(torch.randint(50, (9,)), i % 2) for i in range(2)], model=Quiet())
    assert not any('no variance' in w for w in whats(learn))
    learn.model.bn.num_batches_tracked += 10  # trained with a variance of 1: something has gone since
    assert finding(learn, 'no variance').layers == ('bn',)
    learn = healthy()
    with torch.no_grad():
        learn.model[0][0].weight.zero_()
    assert finding(learn, 'no variance').layers == ('0.1',)


# The fit


class Twice(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.deep = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head, self.reentrant = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.deep, self.stem(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('cbs', [None, BatchNormFreeze])
def test_layers_run_twice_are_those_that_checkpointing_runs_twice(reentrant, cbs):
    learn = healthy(n=32, model=Twice(reentrant), splitter=one_group, cbs=cbs and cbs())
    for m in (learn.model.stem[1], learn.model.deep[1]):
        m.running_mean.fill_(1000.0)
    found = [f for f in learn.bn_check().findings if 'checkpointing' in f.what]
    assert [f.layers for f in found] == [('deep.1',)] * (cbs is None)
    train(learn, 1, lr=0.0)
    left = lambda layer: layer.running_mean.mean().item() / 1000
    assert left(learn.model.stem[1]) == pytest.approx(0.9, abs=0.01)
    assert left(learn.model.deep[1]) == pytest.approx(0.81 if found else 0.9, abs=0.01)


def test_checkpointing_without_a_backward_pass_and_of_held_layers():
    learn = healthy(model=Twice(False), splitter=one_group)
    set_bn_mode(learn.model.deep, 'stats-only')
    assert whats(learn) == []
    learn = healthy(model=Twice(False), splitter=lambda m: [*m.head.parameters()])
    for p in (*learn.model.stem.parameters(), *learn.model.deep.parameters()):
        p.requires_grad = False
    assert not any('checkpointing' in w for w in whats(learn))


@pytest.mark.parametrize('switch', ['grad_checkpointing', 'gradient_checkpointing', 'memory_efficient', 'with_cp', 'use_checkpoint'])
def test_checkpointing_in_training_alone_is_known_by_its_switch(switch):
    learn = healthy()
    setattr(learn.model[0], switch, True)
    assert finding(learn, 'checkpointing').layers == ('0.1', '0.4')
    setattr(learn.model[0], switch, False)
    assert whats(learn) == []


def test_checkpointing_of_timm_and_torchvision():
    ds = [(torch.randn(3, 64, 64), i % 2) for i in range(32)]
    dls = DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=16))
    net = timm.create_model('efficientnet_b0', num_classes=2)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    assert whats(learn) == []
    net.set_grad_checkpointing()
    assert finding(learn, 'checkpointing').layers[0] == 'blocks.0.0.bn1'
    learn = Learner(dls, torchvision.models.densenet121(memory_efficient=True, num_classes=2), loss_func=CrossEntropyLossFlat())
    assert finding(learn, 'checkpointing').layers[0] == 'features.denseblock1.denselayer1.norm1'


def named(name, base=Callback, **attrs):
    return type(name, (base,), attrs)()


@pytest.mark.parametrize(
    'name,averages',
    [(n, True) for n in ('EMACallback', 'ModelEma', 'EMA', 'SWA', 'SWACallback', 'FastSwa', 'WeightAveraging', 'swa', 'my_ema_cb')]
    + [(n, True) for n in ('ExponentialMovingAverage', 'PolyakAveraging', 'MovingAverageCallback')]
    + [
        (n, False)
        for n in ('SemanticCallback', 'SCHEMA', 'SWAPCallback', 'Emanate', 'AverageLoss', 'Swapper', 'Remap', 'MovingAverageLoss')
    ],
)
def test_callbacks_that_average_weights(name, averages):
    assert any('averages weights' in w for w in whats(healthy(cbs=named(name)))) == averages


def test_averages_in_a_subclass_or_in_an_attribute():
    ours = named('Ours', type(named('EMACallback')))
    assert finding(healthy(cbs=ours), '`Ours` averages weights').layers == ('0.1', '0.4', '1.2')
    holder = named('Holder')
    holder.average = AveragedModel(nn.Linear(2, 2))
    assert finding(healthy(cbs=holder), '`Holder` averages weights')


def test_averages_do_no_harm_where_statistics_are_fixed_or_renewed():
    assert whats(healthy(cbs=named('EMACallback')).freeze_to_bn(-1, bn_above='affine-only')) == []
    assert whats(healthy(cbs=[named('EMACallback'), BatchNormRecalibrate()])) == []


def no_gradient(pred, targ):
    return 0 * pred.sum()


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('wd_bn_bias', [False, True])
@pytest.mark.parametrize('wd', [0.0, 0.1])
def test_decay_is_what_an_optimizer_does(opt, wd_bn_bias, wd):
    learn = healthy(opt_func=OPTIMIZERS[opt], wd_bn_bias=wd_bn_bias, wd=wd, loss_func=no_gradient)
    found = [f.layers for f in learn.bn_check().findings if 'weight decay' in f.what]
    weight = learn.model[0][1].weight.detach().clone()
    train(learn, 1, lr=0.1)
    assert found == [('0.1', '0.4', '1.2')] * (not torch.equal(weight, learn.model[0][1].weight))


def test_decay_of_the_optimizer_itself_and_of_types_that_fastai_lacks():
    learn = healthy(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), wd=None)
    assert finding(learn, 'weight decay')  # torch's default is 0.01
    model = nn.SyncBatchNorm.convert_sync_batchnorm(healthy().model)
    assert finding(healthy(model=model), 'weight decay').layers == ('0.1', '0.4', '1.2')
    assert whats(healthy(model=model, wd=0.0)) == []


def test_parameters_that_the_optimizer_lacks():
    learn = healthy()
    learn.create_opt()
    learn.model[1][2] = nn.BatchNorm1d(4)
    found = finding(learn, 'parameters that train, but are not in the optimizer: 1.2.weight, 1.2.bias')
    assert found.layers == ('1.2',)
    learn.create_opt()
    assert whats(learn) == []


def moves(learn, layers):
    before = bits(b for n in layers for b in norm_layers(learn.model)[n].state_dict().values())
    train(learn, 1)
    return not same(before, [b for n in layers for b in norm_layers(learn.model)[n].state_dict().values()])


FREEZES = {
    'fastai': lambda learn: learn.freeze(),
    'freeze_to_bn': lambda learn: learn.freeze_to_bn(-1),
    'held by set_bn_mode': lambda learn: (learn.freeze(), set_bn_mode(learn.model[0], 'frozen')),
}


@pytest.mark.parametrize('freeze', FREEZES)
@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('cbs', [None, BnFreeze])
def test_the_frozen_part_moves_in_a_fit_just_where_it_is_said_to(freeze, train_bn, cbs):
    learn = healthy(train_bn=train_bn, cbs=cbs and cbs())
    FREEZES[freeze](learn)
    found = [f for f in learn.bn_check().findings if 'in the frozen part' in f.what]
    if found:
        assert found[0].layers == ('0.1', '0.4') and '`learn.freeze_to_bn(1)`' in found[0].remedy
        assert ('weight and bias' in found[0].what) == train_bn
        assert ('`BnFreeze` does nothing' in found[0].why) == (cbs is not None)
    assert moves(learn, ['0.1', '0.4']) == bool(found)


def test_a_mode_set_by_hand_is_a_choice():
    learn = healthy()
    learn.freeze()
    set_bn_mode(learn.model[0], 'stats-only')
    assert whats(learn) == []


def test_a_body_frozen_by_hand():
    model = healthy().model
    for p in model[0].parameters():
        p.requires_grad = False
    learn = healthy(model=model, splitter=trainable_params)
    assert finding(learn, 'in the frozen part: its statistics move').layers == ('0.1', '0.4')
    assert 'BatchNormFreeze()' in finding(learn, 'in the frozen part').remedy
    learn.add_cb(BatchNormFreeze())
    assert whats(learn) == [] and not moves(learn, ['0.1', '0.4'])


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('wd', [0.0, 0.1])
@pytest.mark.parametrize('cleared', [True, False])
def test_what_was_trained_before_moves_on_just_where_it_is_said_to(opt, wd, cleared):
    learn = healthy(opt_func=OPTIMIZERS[opt], wd=wd, train_bn=False)
    train(learn, 1)
    learn.freeze() if cleared else learn.opt.freeze_to(1)
    said = any('trained before' in w for w in whats(learn))
    conv = bits(learn.model[0].parameters())
    train(learn, 1)
    assert said == (not same(conv, learn.model[0].parameters()))


def test_the_remedy_for_what_was_trained_before():
    learn = healthy(wd=0.1)
    train(learn, 1)
    learn.freeze()
    assert 'freeze_to_bn(1)' in finding(learn, 'trained before').remedy
    assert whats(learn.freeze_to_bn(1)) == []


# What cannot be looked at


class Stream(IterableDataset):
    def __iter__(self):
        return (((torch.randn(3, 8, 8)), i % 2) for i in range(64))


def generator_of_batches():
    yield from [(torch.randn(32, 3, 8, 8), torch.zeros(32).long())] * 3


LOADERS = {
    'empty': (lambda: DataLoader([], bs=4), 'does not contain any batches'),
    'empty of torch': (lambda: TorchLoader(TensorDataset(torch.zeros(0, 3, 8, 8)), 4), 'yields nothing'),
    'a generator': (generator_of_batches, 'would lose the batch'),
    'over a generator': (lambda: DataLoader(generator_of_batches(), bs=None), 'would lose the batch'),
    'dicts': (lambda: DataLoader([dict(x=torch.zeros(3))] * 64, bs=32), 'not dict'),
    'a dataset that raises': (lambda: DataLoader([None] * 64, bs=32), 'No training batch'),
    'not for this model': (lambda: DataLoader([(torch.zeros(2), 0)] * 64, bs=32), 'could not be run'),
    'nothing': (lambda: None, 'No training batch'),
}


@pytest.mark.parametrize('kind', LOADERS)
def test_all_that_needs_no_batch_is_told_without_one(kind):
    learn = healthy(train_bn=False, wd_bn_bias=True)
    make, said = LOADERS[kind]
    learn.dls = DataLoaders(dl := make(), dl)
    learn.freeze()
    learn.model[0][1].momentum = 0.0
    report = learn.bn_check()
    assert any(said in f.what for f in report.findings), report
    for word in ('by their momentum', 'in the frozen part', 'weight decay'):
        assert any(word in f.what for f in report.findings)
    if kind == 'a generator':
        assert len([*dl]) == 3


@pytest.mark.parametrize('loader', [DataLoader, TorchLoader])
def test_iterable_datasets(loader):
    learn = healthy()
    learn.dls = DataLoaders(*[loader(Stream(), batch_size=32)] * 2)
    assert whats(learn, 3) == [] and 'batches of 32; at least' in learn.bn_check().title


def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))
    learn = healthy(model=model, splitter=one_group)
    assert len(whats(learn)) == 1 and 'lazy layers' in whats(learn)[0]
    assert isinstance(model[1], nn.LazyBatchNorm2d) and learn.opt is None


def test_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = healthy().model

        def forward(self, a, b):
            return self.net(a + b)

    learn = healthy(model=Sum(), splitter=one_group)
    ds = [(torch.randn(3, 8, 8), torch.randn(3, 8, 8), i % 2) for i in range(64)]
    learn.dls = DataLoaders(DataLoader(ds, bs=32), DataLoader(ds, bs=32))
    learn.dls.n_inp = 2
    assert whats(learn) == [] and '32 values' in learn.bn_check().title


@pytest.mark.parametrize('wrap', [nn.DataParallel, partial(torch.compile, backend='eager')])
def test_wrapped_models_have_the_names_of_what_is_inside(wrap):
    learn = healthy(bs=8, model=wrap(healthy().model), splitter=one_group)
    assert finding(learn, 'small batches').layers == ('1.2', '0.4', '0.1')


# Nothing changes


def state(learn):
    model, dl = learn.model, learn.dls.train
    return dict(
        tensors=bits(model.state_dict().values()),
        versions=[t._version for t in model.state_dict().values()],
        grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()],
        requires=[p.requires_grad for p in model.parameters()],
        flags=[m.training for m in model.modules()],
        attributes=[{k: v for k, v in vars(m).items() if k not in ('_parameters', '_buffers', '_modules')} for m in model.modules()],
        hooks=[(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        rng=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        loader={k: v.getstate() if k == 'rng' else v for k, v in vars(dl).items()},
        learner={k: v for k, v in vars(learn).items() if k not in ('model', 'dls')},
        splits=None if learn.opt is None else (deepcopy(learn.opt.state_dict()), learn.opt.frozen_idx),
    )


def assert_as_before(before, learn):
    after = state(learn)
    for k in ('tensors', 'grads'):
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before.pop(k), after.pop(k), strict=True)), k
    for k in ('rng', 'splits'):
        assert str(before.pop(k)) == str(after.pop(k)), k
    for k in before:
        assert before[k] == after[k], k


PREPARED = {
    'fresh': lambda learn: None,
    'with an optimizer': lambda learn: learn.create_opt(),
    'frozen': lambda learn: learn.freeze(),
    'fitted': lambda learn: train(learn, 1),
    'fitted under a policy': lambda learn: train(learn.freeze_to_bn(-1), 1),
    'policy, no optimizer': lambda learn: (learn.freeze_to_bn(-1), setattr(learn, 'opt', None)),
    'parts in eval mode': lambda learn: (learn.model.train(), learn.model[0].eval()),
    'a built optimizer': lambda learn: setattr(learn, 'opt_func', OptimWrapper(opt=torch.optim.Adam(learn.model.parameters()))),
    'with a learning rate': lambda learn: setattr(learn, 'opt_func', partial(OPTIMIZERS['adam'], lr=0.5)),
}


def raising(error):
    def forward(*args, **kwargs):
        raise error

    return forward


@pytest.mark.parametrize('how', PREPARED)
@pytest.mark.parametrize('error', [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['loader', 'model'])
def test_nothing_changes_on_any_way_out(how, error, where, monkeypatch):
    learn = healthy()
    PREPARED[how](learn)
    if error:
        target, name = (learn.model[0][4], 'forward') if where == 'model' else (learn.dls.train, 'create_item')
        monkeypatch.setattr(target, name, raising(error))
    before = state(learn)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            learn.bn_check()
    else:
        assert any('No training batch' in w or 'could not be run' in w for w in whats(learn)) == (error is not None)
    assert_as_before(before, learn)


def test_an_optimizer_built_beforehand_keeps_its_state():
    learn = healthy()
    built = torch.optim.Adam(learn.model.parameters())
    learn.model(torch.randn(8, 3, 8, 8)).sum().backward()
    built.step()
    learn.opt_func = OptimWrapper(opt=built)
    learn.bn_check()
    assert learn.opt is None and len(built.state) == len([*learn.model.parameters()]) and not learn.opt_func.state


def test_a_splitter_that_raises_is_not_hidden():
    learn = healthy(splitter=raising(RuntimeError('my splitter')))
    with pytest.raises(RuntimeError, match='my splitter'):
        learn.bn_check()
    assert learn.opt is None


class AtEvent(Callback):
    "Calls `bn_check` at one event of a fit"

    order = 99

    def __init__(self, event):
        self.event, self.reports = event, []

    def __call__(self, event):
        if event == self.event:
            self.reports.append(self.learn.bn_check())


EVENTS = 'before_fit before_epoch before_train before_batch after_pred after_loss before_step after_batch after_train after_epoch after_fit'


def run(event, freeze, bs=16, iterable=False):
    set_seed(0)
    model = nn.Sequential(*body_and_head())
    model[1].insert(3, nn.Dropout(0.3))
    learn = healthy(model=model)
    if iterable:
        learn.dls = DataLoaders(*[DataLoader([(torch.randn(3, 8, 8), i % 2) for i in range(48)], bs=bs, indexed=False)] * 2)
    else:
        learn.dls = make_dls(48, bs)
    if freeze:
        learn.freeze_to_bn(-1, bn='stats-only')
    set_seed(1)
    cb = AtEvent(event)
    train(learn, 2, cbs=[cb] if event else [])
    return bits(learn.model.state_dict().values()), [row[:2] for row in learn.recorder.values], cb.reports


@pytest.mark.parametrize('freeze', [False, True])
@pytest.mark.parametrize('event', EVENTS.split())
def test_a_fit_goes_on_as_if_nobody_had_asked(event, freeze):
    (weights, losses, _), (weights_too, losses_too, reports) = run(None, freeze), run(event, freeze)
    assert same(weights, weights_too) and losses == losses_too and len(reports) >= 1


def test_a_fit_over_an_iterable_dataset_goes_on():
    expected = run(None, False, iterable=True)
    found = run('before_batch', False, iterable=True)
    assert same(expected[0], found[0]) and expected[1] == found[1]


def test_loaders_with_workers_of_torch_go_on():
    ds = TensorDataset(torch.arange(12.0)[:, None, None, None].expand(12, 3, 8, 8), torch.zeros(12).long())
    learn = healthy()
    learn.dls = DataLoaders(dl := TorchLoader(ds, 4, num_workers=1, persistent_workers=True), dl)
    seen = []
    for _, (x, _) in zip(range(9), dl):  # a loader that is reset would begin anew for ever
        learn.bn_check()
        seen += x[:, 0, 0, 0].tolist()
    assert seen == [*range(12)] and dl._iterator is not None


def test_learners_copied_loaded_and_interrupted(tmp_path):
    learn = healthy()
    train(learn.freeze_to_bn(-1), 1)
    learn.path = tmp_path
    learn.export('learn.pkl')
    assert whats(deepcopy(learn)) == []
    assert ['No training batch' in w for w in whats(load_learner(tmp_path / 'learn.pkl'))] == [True]

    class Stop(Callback):
        def after_batch(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(learn, 1, cbs=Stop())
    assert whats(learn) == []


def test_cancelled_fits_and_a_learner_within_other_blocks():
    learn = healthy(cbs=named('Cancel', after_batch=lambda self: (_ for _ in ()).throw(CancelFitException)))
    train(learn, 1)
    assert whats(learn) == []
    learn = healthy().freeze_to_bn(-1)
    train(learn, 1)
    with learn.fold_frozen():
        learn.bn_check()
    with learn.recalibrate_bn(n_batches=1):
        assert whats(learn) == []


# What is shown


def test_the_report_is_text_page_and_table():
    report = healthy(bs=4, n=37, train_bn=False, wd_bn_bias=True).bn_check(2)
    assert isinstance(report.df, pd.DataFrame) and list(report.df) == ['severity', 'what', 'layers', 'why', 'remedy']
    assert report.df.severity.tolist() == sorted(report.df.severity, key=['error', 'warning', 'note'].index) and len(report.df) > 2
    for f in report.findings:
        assert f.what in str(report) and f.remedy in str(report)
    html = report._repr_html_()
    assert '<table' in html and '<code>' in html and '`' not in html
    quiet = healthy().bn_check()
    assert list(quiet.df) == list(report.df) and len(quiet.df) == 0 and '<table' not in quiet._repr_html_()


def test_what_is_told_is_escaped():
    learn = healthy()
    learn.dls = DataLoaders(dl := DataLoader([None] * 64, bs=32), dl)
    learn.dls.train.create_item = raising(ValueError('<b>'))
    assert '<b>' in str(learn.bn_check()) and '<b>' not in learn.bn_check()._repr_html_()


def test_a_model_that_is_one_layer():
    learn = healthy(model=nn.BatchNorm2d(3), splitter=one_group, bs=8)
    assert 'in the model itself' in finding(learn, 'small batches').what
