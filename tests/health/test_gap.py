"The gap: causes that are known by how the network was made, figures by hand, and a Learner that stays as it is"

import copy, pickle, random, re

import matplotlib.pyplot as plt, numpy as np, pytest, timm, torch
from cases import CASES, learner, net, samples, trained
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import Adam
from learners import bits, make_learner, same
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.health.causes import causes_of, Figures, no_cause, parts_of
from bnfreeze_fastai.health.samples import is_cut, shuffled
from bnfreeze_fastai.health.figures import look
from bnfreeze_fastai.health.losses import Losses
from bnfreeze_fastai.layers import bn_layers
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
KNOWN = dict(
    healthy=([], 'Nothing found'),
    low_momentum=(['stale statistics'], 'momentum is too low .* weigh 94%.*recalibrate_bn.*set_bn_momentum'),
    averaged_weights=(['stale statistics'], 'can be .*averaged .*recalibrate_bn.*BatchNormRecalibrate'),
    normalised_otherwise=(['different inputs'], 'another scale or offset.*factor of 2.*normalisation, transforms'),
    overfitted=(['generalisation'], 'not seen.*more data, augment more, regularise'),
)


def names(gap):
    return [cause.name for cause in gap.causes]


def losses(gap):
    return {(row.samples, row.statistics): row.loss for row in gap.df.itertuples()}


@pytest.mark.parametrize('case', CASES)
def test_a_known_cause_is_named_and_no_other(case):
    learn = trained(case)
    gap = learn.bn_gap()
    found, said = KNOWN[case]
    assert names(gap) == found and re.search(said, gap.verdict), gap.verdict
    assert gap.parts.loss.sum() == pytest.approx(gap.gap) == losses(gap)['valid', 'stored'] - losses(gap)['train', 'batch']
    if found:
        assert gap.parts.set_index('part').share[found[0]] > 0.8
    if found == ['stale statistics']:  # the remedy helps
        learn.recalibrate_bn()
        after = learn.bn_gap()
        assert names(after) == [] and after.gap < gap.gap / 2


def test_several_causes_at_once_the_largest_first():
    learn = trained('overfitted')
    for layer in bn_layers(learn.model):
        layer.running_mean += 0.5 * layer.running_var.sqrt()
    gap = learn.bn_gap()
    assert set(names(gap)) == {'generalisation', 'stale statistics'}
    of = gap.parts.set_index('part').loss
    assert [of[name] for name in names(gap)] == sorted((of[name] for name in names(gap)), reverse=True)


def made(**means):
    "Losses of a hundred samples with a little noise around each mean"
    noise = torch.linspace(-0.1, 0.1, 100).double()
    return {k.replace('_', '-'): Losses(noise + v, torch.ones(100)) for k, v in means.items()}


def named_of(train, valid):
    figures = Figures(made(**train), made(**valid))
    parts = parts_of(figures)
    assert np.isinf(figures.gap.value) or sum(e.value for e in parts.values()) == pytest.approx(figures.gap.value)
    return [cause.name for cause in causes_of(figures, parts, {'1': nn.BatchNorm1d(2)})], no_cause(figures)


@pytest.mark.parametrize('batch', [0.2, 0.01])
@pytest.mark.parametrize('re_estimated,own', [(0.8, 0.5), (0.8, 0.02), (0.02, 0.019)])
def test_no_part_is_named_that_makes_the_loss_larger(batch, re_estimated, own):
    "The stored statistics are best for validation: neither its own nor the re-estimated ones are a remedy"
    train = dict(batch=batch, stored=0.1, re_estimated=0.1)
    assert set(named_of(train, dict(stored=0.02, re_estimated=re_estimated, own=own))[0]) <= {'batch dependence'}
    stale = dict(batch=0.1, stored=0.9, re_estimated=0.1)
    assert named_of(stale, dict(stored=0.3, re_estimated=0.8, own=0.8))[0] == ['generalisation']


def test_samples_that_are_not_finite_are_no_generalisation():
    train, nan = dict(batch=0.1, stored=0.1, re_estimated=0.1), float('nan')
    found, said = named_of(train, dict(stored=nan, re_estimated=nan, own=nan))
    assert found == [] and said.startswith('Cannot tell: the loss is not finite')
    assert named_of(train, dict(stored=nan, re_estimated=0.1, own=0.1))[0] == ['stale statistics']
    assert named_of(dict(stored=0.1), dict(stored=nan))[0] == []  # without batch norm


def test_a_network_that_relies_on_its_batch():
    "Its training batches are all of one class, and the mean of its input over the batch tells which"

    class OwnBatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, x):
            return torch.cat([self.bn(x), -self.bn(x)], 1)

    x = torch.randn(256, 1, generator=torch.Generator().manual_seed(0))
    x, y = x + 5 * (torch.arange(256) // 16 % 2)[:, None], (x[:, 0] < 0).long()
    dls = DataLoaders(*[DataLoader(TensorDataset(x, y), batch_size=16)] * 2, device='cpu')
    learn = learner(samples(8), model=OwnBatch(), bs=4)
    learn.dls = dls
    learn.recalibrate_bn()
    gap = learn.bn_gap()
    assert names(gap) == ['batch dependence'] and 'batches are shuffled' in gap.verdict


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('sizes', [(64, 16, 16), (128, 8, 32), (64, 64, 64)])
def test_no_false_alarm_on_little_data(seed, sizes):
    n, n_valid, bs = sizes
    learn = learner(samples(n, seed=10 + seed), samples(n_valid, seed=100 + seed), bs=bs)
    learn.fit(4)
    assert names(learn.bn_gap()) == []


def test_a_difference_within_its_noise_is_not_called():
    learn = trained('overfitted')
    learn.dls.valid = learner(samples(8), samples(2, noise=3, seed=1)).dls.valid
    gap = learn.bn_gap()
    assert names(gap) == [] and gap.gap > 0.1 and gap.verdict.startswith('Cannot tell: the gap does not stand out')
    assert gap.parts.share.isna().all()


def by_hand(learn, statistics):
    "The loss of the training and validation samples, in one batch order that shuffling cannot change"
    model, found = copy.deepcopy(learn.model), {}
    for of, dl in zip(('train', 'valid'), learn.dls.loaders):
        batches, own = [b for b in dl], copy.deepcopy(model)
        if statistics in ('re-estimated', 'own'):
            source = learn.dls.train if statistics == 're-estimated' else dl
            recalibrate_bn(own, list(source), progress=False)
        own.train(statistics == 'batch')
        with torch.no_grad():
            each = [(float(learn.loss_func(own(*b[:-1]), b[-1])), len(b[-1])) for b in batches]
        found[of] = sum(loss * n for loss, n in each) / sum(n for _, n in each)
    return found


def test_figures_by_hand():
    "Uneven batches: 100 is not a multiple of 32"
    xy, valid = samples(100), samples(70, seed=1)
    in_order = [DataLoader(TensorDataset(*o), batch_size=32, sampler=range(len(o[0]))) for o in (xy, valid)]
    dls = DataLoaders(*in_order, device='cpu')
    learn = learner(samples(64))
    learn.dls = dls
    learn.fit(2)
    found = losses(learn.bn_gap())
    for statistics in ('batch', 'stored', 're-estimated', 'own'):
        for of, loss in by_hand(learn, statistics).items():
            if (of, statistics) in found:
                assert found[of, statistics] == pytest.approx(loss, rel=1e-4), (of, statistics)
    assert len(found) == 6 and found['valid', 'stored'] == pytest.approx(learn.validate()[0], rel=1e-5)


def test_layers_by_hand():
    learn = trained('averaged_weights')
    learn.dls = DataLoaders(DataLoader(TensorDataset(*samples(96)), batch_size=32), device='cpu')
    layers = learn.bn_gap().layers
    new = copy.deepcopy(learn.model)
    recalibrate_bn(new, list(learn.dls.train), progress=False)
    mixed, by = copy.deepcopy(learn.model).eval(), {}
    for name in ('1', '4', '7'):
        mixed.get_submodule(name).load_state_dict(new.get_submodule(name).state_dict())
        with torch.no_grad():
            by[name] = np.mean([float(learn.loss_func(mixed(x), y)) for x, y in learn.dls.train])
    assert layers.layer.tolist() == [*by] and layers.loss.tolist() == pytest.approx([*by.values()], rel=1e-4)
    assert layers.recovered.iloc[-1] == 1


def test_layers_stand_in_the_order_of_the_forward_pass():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.unused = nn.BatchNorm2d(3)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

        def forward(self, x):
            return self.head(self.last(self.first(x)))

    gap = learner(samples(64), samples(32), Turned()).bn_gap()
    assert gap.layers.layer.tolist() == ['first', 'last'] and 'unused' in gap.notes[0]


def state(learn):
    model, opt = learn.model, learn.opt
    own = {k: v for k, v in vars(learn).items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [
        *bits(model.state_dict().values()),
        *bits(t for s in (opt.state_dict()['state'] if opt else []) for t in s.values() if torch.is_tensor(t)),
    ]
    rng = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), learn.dls.train.rng.getstate()
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    recorded = copy.deepcopy([getattr(learn.recorder, k, None) for k in ('values', 'losses', 'log')])
    return values, (own, hooks, flags, rng, recorded, learn.loss_func.reduction, [*learn.cbs]), grads


def unchanged(learn, before):
    after = state(learn)
    assert same(before[0], after[0]) and before[1] == after[1]
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[2], after[2]))


@pytest.mark.parametrize('fitted', [True, False])
def test_nothing_changes(fitted):
    learn = learner(samples(96), samples(64, seed=1), opt_func=Adam)
    if fitted:
        learn.fit(1)
    learn.model[0].eval()
    before = state(learn)
    assert (learn.opt is None) != fitted
    assert repr(learn.bn_gap(n_batches=2)) != repr(learn.bn_gap())
    unchanged(learn, before)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('at', [1, 3, 5, 9])
def test_nothing_changes_when_it_breaks_off(error, at):
    learn = learner(samples(96), samples(64, seed=1))
    learn.fit(1)
    before, calls = state(learn), [0]

    def breaks_off(*args):
        calls[0] += 1
        if calls[0] == at * 7:
            raise error('enough')

    handle = nn.modules.module.register_module_forward_hook(breaks_off)
    try:
        with pytest.raises(error):
            learn.bn_gap()
    finally:
        handle.remove()
    unchanged(learn, before)


def test_the_next_epochs_are_those_without_it():
    weights = []
    for looks in (False, True):
        learn = learner(samples(96), samples(64, seed=1))
        for _ in range(2):
            if looks:
                learn.bn_gap()
            learn.fit(1)
        weights.append(bits(learn.model.state_dict().values()))
    assert same(*weights)


class Looks(Callback):
    def __init__(self, event, found):
        self.found = found
        setattr(self, event, self.look)

    def look(self):
        self.found.append(self.learn.bn_gap(n_batches=2))


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_backward', 'after_train', 'before_validate', 'after_epoch'])
@pytest.mark.parametrize('policy', [None, BatchNormFreeze(), BatchNormFreeze(bn_above='affine-only')])
def test_within_a_fit(event, policy):
    weights, found = [], []
    for cbs in ([], [Looks(event, found)]):
        learn = make_learner(cbs=[] if policy is None else [copy.copy(policy)])
        learn.fit(1)
        learn.create_opt()
        learn.freeze_to(1)
        learn.fit(2, cbs=cbs)
        weights.append(bits(learn.model.state_dict().values()) + [torch.tensor(learn.recorder.values)])
    assert same(*weights) and found


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.images, self.numbers, self.head = net(), nn.BatchNorm1d(5), nn.Linear(9, 4)

    def forward(self, x, z):
        return self.head(torch.cat([self.images(x), self.numbers(z)], 1))


def of_tensors(train, valid, model, n_inp=1, **kwargs):
    learn = learner(samples(8), model=model, bs=4, **kwargs)
    loader = lambda tensors, **kw: DataLoader(TensorDataset(*tensors), batch_size=32, **kw)
    learn.dls = DataLoaders(loader(train, shuffle=True), loader(valid), device='cpu')
    learn.dls.n_inp = n_inp
    return learn


def test_several_inputs():
    x, y = samples(128)
    learn = of_tensors((x, torch.randn(128, 5), y), (x, torch.randn(128, 5), y), TwoInputs(), 2)
    learn.fit(1)
    assert set(learn.bn_gap().layers.layer) == {'images.1', 'images.4', 'images.7', 'numbers'}


def test_regression():
    x, y = samples(256, classes=2)
    for scale, found in ((1, []), (3, ['different inputs'])):
        xv, yv = samples(256, classes=2, seed=1)
        learn = of_tensors((x, y[:, None].float()), (xv * scale, yv[:, None].float()), net(1), loss_func=MSELossFlat())
        learn.fit(5, 0.05)
        assert names(learn.bn_gap()) == found


def test_segmentation():
    x, y = samples(128)
    mask = (x.mean(1) > 0).long()
    layer = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o, momentum=0.001), nn.ReLU()]
    model = nn.Sequential(*layer(3, 8), *layer(8, 8), nn.Conv2d(8, 2, 1))
    learn = of_tensors((x, mask), (x, mask), model, loss_func=CrossEntropyLossFlat(axis=1))
    learn.fit(4)
    gap = learn.bn_gap()
    assert names(gap) == ['stale statistics'] and gap.df.n.unique().tolist() == [128]


def test_a_loss_that_sums_is_told_by_sample():
    learn = learner(samples(128), samples(100, seed=1))
    learn.fit(1)
    mean = learn.bn_gap().df.loss
    learn.loss_func = CrossEntropyLossFlat(reduction='sum')
    assert learn.bn_gap().df.loss.tolist() == pytest.approx(mean.tolist())


BY_MODEL = {
    '1d': lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    '3d': lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.Flatten(), nn.Linear(288, 4)),
    'sync': lambda: net(norm=nn.SyncBatchNorm),
    'instance': lambda: net(norm=lambda n, momentum: nn.InstanceNorm2d(n, track_running_stats=True)),
    'timm': lambda: net(norm=lambda n, momentum: timm.layers.BatchNormAct2d(n)),
    'no affine': lambda: net(norm=lambda n, momentum: nn.BatchNorm2d(n, affine=False)),
    'cumulative': lambda: net(momentum=None),
    'some without statistics': lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *net()),
    'some frozen by construction': lambda: nn.Sequential(FrozenBatchNorm2d(3), *net()),
    'dropout': lambda: nn.Sequential(nn.Dropout(0.5), *net()),
    'spread': lambda: nn.DataParallel(net()),
    'compiled': lambda: torch.compile(net(), backend='eager'),
    'used twice': lambda: nn.Sequential(bn := nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), bn, nn.Flatten(), nn.Linear(192, 4)),
    'half': lambda: net().bfloat16(),
}


@pytest.mark.parametrize('case', BY_MODEL)
def test_layers_of_every_kind(case):
    model = BY_MODEL[case]()
    dtype = next(model.parameters()).dtype
    tensors = lambda seed: (samples(64, seed=seed)[0].to(dtype), samples(64, seed=seed)[1])
    learn = of_tensors(tensors(0), tensors(1), model)
    for _ in range(3):
        if case != 'sync':  # which trains on a GPU only
            model.train()(tensors(0)[0])
    before = bits(model.state_dict().values())
    gap = learn.bn_gap()
    assert same(before, model.state_dict().values()) and gap.df.loss.notna().all()
    assert len(gap.layers) == len([l for l in bn_layers(model) if l.running_mean is not None])
    for layer in bn_layers(model):
        if layer.running_mean is not None:
            layer.running_mean += 1
    after = losses(learn.bn_gap())  # only what is stored has changed
    for at, loss in losses(gap).items():
        assert after[at] != loss if at[1] == 'stored' else after[at] == loss


def test_lazy_layers_are_named():
    learn = learner(samples(64), samples(32), nn.Sequential(nn.LazyBatchNorm2d(), nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(ValueError, match='lazy layers without shapes'):
        learn.bn_gap()


NONE = {
    'linear': (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 'no layer that keeps running statistics'),
    'group norm': (lambda: net(norm=lambda n, momentum: nn.GroupNorm(2, n)), 'no layer that keeps running statistics'),
    'no statistics': (lambda: net(norm=lambda n, momentum: nn.BatchNorm2d(n, track_running_stats=False)), 'no layer that keeps'),
}


@pytest.mark.parametrize('case', NONE)
def test_without_batch_norm(case):
    make, said = NONE[case]
    gap = learner(samples(64), samples(64, seed=1), make()).bn_gap()
    assert said in gap.notes[0] and gap.layers.empty and gap.parts.part.tolist() == ['generalisation']
    assert losses(gap).keys() == {('train', 'stored'), ('valid', 'stored')}
    assert repr(gap) and gap._repr_html_()


def test_what_is_fixed_makes_no_gap():
    learn = make_learner(model=None)
    learn.fit(1)
    learn.freeze_to_bn(1)
    gap = learn.bn_gap()
    assert gap.layers.layer.tolist() == ['1.2'] and 'fixes the statistics of 2 of 3 layers' in ' '.join(gap.notes)
    opt, learn.opt = learn.opt, None
    assert learn.bn_gap().layers.layer.tolist() == ['1.2'] and learn.opt is None
    learn.opt = opt
    learn.freeze_to_bn(0, bn_above='affine-only')
    gap = learn.bn_gap()
    assert gap.layers.empty and 'no layer that keeps' in gap.notes[0] and 'own statistics' not in gap.title


def test_what_bnfreeze_holds_makes_no_gap():
    learn = make_learner(cbs=BnFreeze, train_bn=False)
    learn.freeze()
    gap = learn.bn_gap()
    assert gap.layers.layer.tolist() == ['1.2'] and 'fixes the statistics of 2 of 3 layers' in ' '.join(gap.notes)
    learn.unfreeze()
    assert len(learn.bn_gap().layers) == 3


def test_without_a_validation_set():
    for valid in (None, samples(0)):
        learn = trained('low_momentum')
        learn.dls = learner(samples(512), valid).dls
        gap = learn.bn_gap()
        assert names(gap) == ['stale statistics'] and 'no validation samples' in gap.notes[0]
        assert set(gap.df.samples) == {'train'} and gap.gap == pytest.approx(gap.parts.loss.sum())


def test_without_training_samples(tmp_path):
    make_learner().export(tmp_path / 'a.pkl')
    loaded = load_learner(tmp_path / 'a.pkl')
    with pytest.raises(ValueError, match='There are no'):
        loaded.bn_gap()
    loaded.dls = make_learner().dls
    assert loaded.bn_gap().df.loss.notna().all()
    with pytest.raises(ValueError, match='There are no'):
        learner(samples(8), samples(32), bs=16).bn_gap()  # drop_last


def test_statistics_that_are_not_finite():
    learn = learner(samples(64), samples(64, seed=1))
    learn.fit(1)
    learn.model[4].running_mean[0] = float('nan')
    gap = learn.bn_gap()
    assert names(gap)[0] == 'stale statistics' and "Those of ['4'] are not finite" in gap.verdict and repr(gap)
    learn = trained('healthy')
    learn.model[4].reset_running_stats()
    assert "Those of ['4'] were never trained" in learn.bn_gap().verdict


def test_a_validation_set_too_small_for_statistics_of_its_own():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    gap = learner(samples(64), samples(1), model).bn_gap()
    assert 'no statistics of their own' in ' '.join(gap.notes) and ('valid', 'own') not in losses(gap)


class Stream(IterableDataset):
    def __init__(self, n, seed=None):
        self.n, self.seed = n, seed

    def __iter__(self):
        "Other samples each time, from no generator that could be kept"
        seed = int.from_bytes(random.SystemRandom().randbytes(4), 'big') if self.seed is None else self.seed
        return zip(*samples(self.n, seed=seed))


def test_iterable_datasets_that_never_give_the_same_twice():
    learn = trained('healthy')
    learn.dls = DataLoaders(*[DataLoader(Stream(256), batch_size=32)] * 2, device='cpu')
    assert names(learn.bn_gap()) == [] and names(learn.bn_gap(n_batches=4)) == []
    for layer in bn_layers(learn.model):
        layer.running_mean += layer.running_var.sqrt()
    assert names(learn.bn_gap()) == ['stale statistics']


def test_number_of_batches():
    learn = learner(samples(128), samples(128, seed=1), bs=16)
    assert learn.bn_gap(n_batches=3).df.n.unique().tolist() == [48]
    assert learn.bn_gap(n_batches=None).df.n.unique().tolist() == [128]
    for wrong in (0, -1, 2.5, True, '3'):
        with pytest.raises(ValueError, match='`n_batches` is'):
            learn.bn_gap(n_batches=wrong)


def test_a_validation_set_in_the_order_of_its_classes():
    "Its first batch has one class, which says nothing of the others"
    x, y = samples(512, seed=1)
    order = y.argsort()
    learn = trained('healthy')
    learn.dls.valid = learner(samples(8), (x[order], y[order])).dls.valid
    torch.manual_seed(0)
    few, all_of = losses(learn.bn_gap(n_batches=4)), losses(learn.bn_gap())
    assert few['valid', 'stored'] == pytest.approx(all_of['valid', 'stored'], rel=0.2)
    assert few['valid', 'own'] == pytest.approx(all_of['valid', 'own'], rel=0.2)
    dl = learn.dls.valid
    assert not torch.equal(torch.cat([y for _, y in shuffled(dl)]), y[order]) and torch.equal(torch.cat([y for _, y in dl]), y[order])


class InBatches(DataLoader):
    def __iter__(self):
        return (tuple(batch) for batch in super().__iter__())


def by_class(n=64, loader=DataLoader, **kwargs):
    return loader(TensorDataset(torch.randn(n, 3), torch.arange(n) // 8), **{'batch_size': 8, **kwargs})


def test_shuffled_loaders_of_torch_have_the_same_samples():
    for dl in (by_class(), by_class(61), by_class(61, drop_last=True), by_class(batch_size=64)):
        torch.manual_seed(0)
        new, old = [torch.cat([y for _, y in o]) for o in (shuffled(dl), dl)]
        assert len(new) == len(dl.dataset) and not torch.equal(new[: len(old)], old)
        assert torch.equal(new.bincount(), (torch.arange(len(dl.dataset)) // 8).bincount())


OWN_ORDER = {
    'a sampler': lambda: by_class(sampler=range(64)),
    'a batch sampler': lambda: by_class(batch_size=1, batch_sampler=[[0, 1], [2, 3], [4]]),
    'in its own way': lambda: by_class(loader=InBatches),
    'iterable': lambda: DataLoader(Stream(64), batch_size=8),
    'batches as samples': lambda: by_class(batch_size=None),
    'a list': lambda: [*by_class()],
}


@pytest.mark.parametrize('kind', OWN_ORDER)
def test_loaders_with_an_order_of_their_own_keep_it_and_say_so_where_they_are_cut(kind):
    dl = OWN_ORDER[kind]()
    assert shuffled(dl) is dl and is_cut(dl, 2) and not is_cut(dl, None)
    assert kind == 'iterable' or not is_cut(dl, 64)


def test_a_validation_set_that_is_cut_in_its_order_is_noted():
    learn = of_tensors(samples(64), samples(64, seed=1), net())
    noted = lambda n: 'order of its own' in ' '.join(learn.bn_gap(n_batches=n).notes)
    assert not noted(1)
    learn.dls = DataLoaders(learn.dls[0], DataLoader(learn.dls[1].dataset, batch_size=16, sampler=range(64)), device='cpu')
    assert noted(1) and not noted(None) and not noted(4)
    for kwargs in (dict(shuffle=True), dict(sampler=SubsetRandomSampler(range(64)))):
        assert not is_cut(by_class(**kwargs), 1)


def test_layers_after_a_dropout():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.0), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3))
    x, y = torch.randn(64, 3), torch.arange(64) % 3
    learn = of_tensors((x, y), (x, y), model)
    assert look(learn, 2).dropped == ['5']


def test_a_sampler_of_the_validation_loader_is_kept():
    x, y = samples(64)
    learn = learner(samples(64), samples(64))
    learn.dls = DataLoaders(
        *[DataLoader(TensorDataset(x, y), batch_size=8, sampler=SubsetRandomSampler(idx)) for idx in (range(48), range(48, 64))],
        device='cpu',
    )
    assert learn.bn_gap().df.n.tolist() == [48] * 3 + [16] * 3


def test_callbacks_take_no_part():
    learn = learner(samples(96), samples(64, seed=1))
    learn.fit(1)
    plain, calls = learn.bn_gap(), []

    class Notes(Callback):
        def __getattribute__(self, k):
            if k.startswith(('before_', 'after_')):
                calls.append(k)
            return super().__getattribute__(k)

    learn.add_cbs([MixUp(), Notes()])
    calls.clear()
    mixed = learn.bn_gap()
    assert not calls and mixed.df.equals(plain.df) and 'mix_up changes batches in training' in ' '.join(mixed.notes)


def test_inside_precompute():
    learn = make_learner()
    learn.fit(1)
    learn.freeze_to_bn(1)
    with learn.precompute():
        before = bits(learn.model.state_dict().values())
        gap = learn.bn_gap()
        assert gap.layers.layer.tolist() == ['1.2'] and same(before, learn.model.state_dict().values())
        learn.fit(1)


def test_shown_copied_and_drawn():
    learn = trained('low_momentum')
    gap = learn.bn_gap()
    for shown in (repr(gap), gap._repr_html_()):
        for text in ('Training loss', 'momentum is too low', 'generalisation', 're-estimated', 'log_var_ratio', 'forward passes'):
            assert text in shown
    assert gap._repr_html_().count('<table') == 3 and '<script' not in gap._repr_html_()
    assert repr(pickle.loads(pickle.dumps(gap))) == repr(gap) == repr(copy.deepcopy(gap))
    _, ax = plt.subplots()
    assert gap.plot(ax) is ax and gap.plot() is not ax
    line = ax.lines[0].get_ydata()
    assert line[0] == losses(gap)['train', 'stored'] and line[-1] == losses(gap)['train', 're-estimated']
    plt.close('all')
