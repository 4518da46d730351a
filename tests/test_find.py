"The search for a mode: right on planted problems, and the Learner notices nothing"

import copy, random
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from conftest import body_and_head, bits, make_dls, make_learner, two_groups
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, OptimWrapper, ranger
from fastai.torch_core import params, set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import bnfreeze_fastai.find
from bnfreeze_fastai.all import *

FAR = dict(source=lambda x: 20 * x + 50)  # the stored statistics are those of other data, and batches are large
SMALL_BATCHES = dict(bs=2, n=96, bright=1)  # the stored statistics are right; those of a batch take away what tells the classes apart
NOTHING = dict()  # the stored statistics are right, and so are those of a batch


def planted(seed, n=512, bs=64, source=lambda x: x, bright=0):
    "Four noisy patterns, each `bright` brighter than the last, a random body with statistics of `source` of the images, and a new head"
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 3, 8, 8, generator=g) / 2
    y = [torch.arange(n) % 4, torch.arange(n // 2) % 4]
    brightness = bright * torch.arange(4.0)[:, None, None, None]
    x = [(patterns + brightness)[part] + 1.4 * torch.randn(len(part), 3, 8, 8, generator=g) for part in y]
    dls = DataLoaders.from_dsets(*[list(zip(*part)) for part in zip(x, y)], bs=bs, num_workers=0, device='cpu')
    set_seed(seed)
    conv = lambda n_in: [nn.Conv2d(n_in, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*conv(3), *conv(8)), nn.Sequential(nn.Flatten(), nn.Linear(128, 4)))
    recalibrate_bn(model, source(x[0]).split(64), progress=False)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), splitter=two_groups, lr=1e-2)
    learn.freeze()
    return learn


def find(learn, **kwargs):
    with learn.no_bar():
        return learn.bn_find(**{**dict(epochs=5, cost=0.5, seeds=2, plot=False), **kwargs})


@pytest.mark.parametrize(
    'problem,right',
    [
        (FAR, lambda found: found.suggestion in ('train', 'stats-only')),
        (SMALL_BATCHES, lambda found: found.suggestion in ('affine-only', 'frozen')),
        (NOTHING, lambda found: not found.confident),
    ],
    ids=['far', 'small batches', 'nothing'],
)
def test_planted_problems(problem, right):
    found = [find(planted(seed, **problem)) for seed in range(10)]
    assert sum(map(right, found)) >= 9, [(f.suggestion, f.confident) for f in found]


def test_a_difference_that_is_large_is_told_with_confidence():
    found = [find(planted(seed, **FAR), policies=['train', 'frozen'], epochs=20, seeds=3) for seed in range(3)]
    assert all(f.confident and f.suggestion == 'train' for f in found)


class Everything:
    "All that a search must leave as it is"

    def __init__(self, learn):
        self.learn = learn
        self.tensors = dict(learn.model.state_dict())
        self.before = self.state()

    def state(self):
        learn = self.learn
        opt = learn.opt
        generators = [getattr(dl, k) for dl in learn.dls.loaders for k in ('rng', 'generator') if getattr(dl, k, None) is not None]
        return dict(
            tensors=bits(learn.model.state_dict().values()),
            trains=[p.requires_grad for p in learn.model.parameters()],
            grads=[p.grad if p.grad is None else p.grad.clone() for p in learn.model.parameters()],
            training=[m.training for m in learn.model.modules()],
            momentum=[getattr(m, 'momentum', None) for m in learn.model.modules()],
            hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()],
            opt=None
            if opt is None
            else (id(opt), copy.deepcopy(opt.state_dict()), opt.frozen_idx, [list(map(id, g)) for g in opt.param_lists]),
            cbs=[(id(cb), id(cb.learn)) for cb in learn.cbs],
            learner={k: id(v) for k, v in vars(learn).items() if k not in ('opt', 'create_mbar', 'logger')},
            rng=(random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
            loaders=[g.getstate() if isinstance(g, random.Random) else g.get_state() for g in generators],
            files=sorted(map(str, Path('.').rglob('*'))),
            grad_mode=torch.is_grad_enabled(),
            reduction=getattr(learn.loss_func, 'reduction', None),
        )

    def changed(self):
        now = self.state()
        assert self.tensors.keys() == self.learn.model.state_dict().keys()
        return [k for k in now if not _equal(self.before[k], now[k])]


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def frozen(learn):
    learn.freeze()


def trained_before(learn):
    learn.fit(1)
    learn.freeze_to_bn(-1, bn='stats-only')
    learn.fit(1)


def whole(learn):
    learn.freeze_to_bn(0, bn_above='affine-only')


def by_hand(learn):
    learn.opt = None
    learn.model[0].requires_grad_(False)


def nothing_done(learn):
    pass


def with_callbacks(learn):
    learn.freeze()
    learn.add_cbs([MixUp(), GradientClip(1.0), GradientAccumulation(8), SaveModelCallback(), CSVLogger(), EarlyStoppingCallback()])


def with_fp16(learn):
    learn.freeze()
    learn.to_fp16()


PREPARE = [frozen, trained_before, whole, by_hand, nothing_done, with_callbacks, with_fp16]
OPTIONS = dict(
    sgd=dict(opt_func=SGD),
    ranger=dict(opt_func=ranger),
    torch_adamw=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    function=dict(loss_func=F.cross_entropy),
    reduced=dict(loss_func=lambda pred, y: F.cross_entropy(pred, y)),
    trainable_params=dict(splitter=lambda m: [p for p in m.parameters() if p.requires_grad]),
)


def used_dls():
    dls = make_dls(n=64)
    for _ in dls.train:
        pass
    return dls


def make(**kwargs):
    learn = make_learner(lr=0.01, **{k: v for k, v in kwargs.items() if k != 'dls'})
    learn.dls = kwargs.get('dls') or used_dls()
    recalibrate_bn(learn.model, [(x,) for x, _ in learn.dls.train], progress=False)
    return learn


@pytest.mark.parametrize('prepare', PREPARE, ids=lambda f: f.__name__)
def test_the_learner_is_left_as_it_was(prepare):
    learn = make()
    prepare(learn)
    everything = Everything(learn)
    find(learn)
    assert not everything.changed()


@pytest.mark.parametrize('kwargs', OPTIONS.values(), ids=OPTIONS)
def test_with_any_optimizer_loss_and_splitter(kwargs):
    learn = make(**kwargs)
    everything = Everything(learn)
    found = find(learn)
    assert not everything.changed() and len(found.evidence) == 4


@pytest.mark.parametrize('lr', ['find', slice(1e-4, 1e-2), 0.1])
def test_with_any_learning_rate(lr):
    learn = make()
    learn.freeze()
    everything = Everything(learn)
    found = find(learn, lr=lr, epochs=10)
    assert not everything.changed()
    rates = found.trials.groupby('candidate')['lr'].nunique()
    assert (rates == 1).all() and (lr == 'find' or set(found.trials['lr']) == {str(lr) if isinstance(lr, slice) else lr})
    assert (found.cost > 0.5) == (lr == 'find')


class Raises(Callback):
    order = 90

    def __init__(self, error):
        self.error, self.left = error, 20

    def after_pred(self):
        Raises.count += 1
        if Raises.count == 40:
            raise self.error('stop')


@pytest.mark.parametrize('error', [KeyboardInterrupt, ZeroDivisionError])
def test_the_learner_is_left_as_it_was_when_a_trial_fails(error):
    learn = make()
    learn.freeze_to_bn(-1)
    learn.add_cb(Raises(error))
    Raises.count = 0
    everything = Everything(learn)
    with pytest.raises(error):
        find(learn)
    assert Raises.count == 40 and not everything.changed()


@pytest.mark.parametrize('generator', [None, torch.Generator()])
def test_with_loaders_of_pytorch(generator):
    dsets = [list(dl.dataset) for dl in make_dls(n=64).loaders]
    learn = make(dls=DataLoaders(*[DataLoader(ds, 8, shuffle=i == 0, generator=generator) for i, ds in enumerate(dsets)]))
    everything = Everything(learn)
    find(learn)
    assert not everything.changed()


def test_training_goes_on_as_without_a_search():
    losses = []
    for searches in (False, True):
        learn = make()
        learn.freeze_to_bn(-1)
        learn.fit(1)
        if searches:
            find(learn)
        learn.fit(2)
        losses.append([torch.stack(learn.recorder.losses), learn.final_record])
    assert torch.equal(losses[0][0], losses[1][0]) and list(losses[0][1]) == list(losses[1][1])


def test_the_same_search_gives_the_same_trials():
    a, b, c = (find(planted(0), seeds=s).trials for s in ([0, 1], [0, 1], [2, 3]))
    assert a.equals(b) and not a['valid_loss'].equals(c['valid_loss'])


def test_all_candidates_of_a_round_see_the_same():
    seen = []

    class See(Callback):
        def after_pred(self):
            seen.append((self.training, self.xb[0].clone(), self.learn.opt.hypers[-1]['lr']))

    learn = planted(0, n=64, bs=8)
    learn.add_cb(See())
    trials = find(learn, lr=0.1).trials
    by_round = {}
    for row in trials.itertuples():
        n = row.train_batches + row.valid_batches
        mine, seen = seen[:n], seen[n:]
        by_round.setdefault((row.round, row.seed), []).append(mine)
    assert not seen and [len(group) for group in by_round.values()] == [4, 4, 2, 2]
    for first, *others in by_round.values():
        for other in others:
            assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(first, other, strict=True))
        assert max(lr for training, _, lr in first if training) == pytest.approx(0.1, rel=0.1)
    train = [torch.stack([x for training, x, _ in group[0][:4] if training]) for group in by_round.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(train) for b in train[:i])  # another seed or round, other batches


def test_statistics_forget_the_old_as_in_a_full_run():
    seen = set()

    class See(Callback):
        def before_batch(self):
            seen.add(self.learn.model[0][1].momentum)

    learn = planted(0)
    learn.add_cb(See())
    trials = find(learn, policies=['train', 'frozen']).trials
    n, full = trials['train_batches'][0], 5 * len(learn.dls.train)
    assert len(seen) == 1 and (1 - seen.pop()) ** n == pytest.approx(max(0.9**full, 0.01))


def test_fastai_is_fastai_whatever_policy_the_learner_had():
    learn = planted(0)
    learn.freeze_to_bn(-1)
    trials = find(learn, policies=['fastai', 'train', 'frozen']).trials
    losses = trials[trials['round'] == 1].groupby('candidate')['valid_loss'].apply(list)
    assert losses['fastai'] == losses['train'] != losses['frozen']


def test_what_is_found_can_be_set():
    learn = planted(0)
    for policies in (None, ['train', 'frozen']):
        found = find(learn, policies=policies)
        learn.freeze_to_bn(-1, **found.policy._asdict())
        assert set(modes_in_force(learn).values()) == {found.suggestion}
        learn.unfreeze()
        assert set(learn.bn_summary().df['mode']) == {found.suggestion}


def test_a_callback_that_holds_a_part_of_the_model_holds_that_of_the_copy():
    held = []

    class Holds(Callback):
        def __init__(self, part):
            self.part = part

        def before_batch(self):
            held.append((self.part is self.learn.model[0], self.learn.model[0] is learn.model[0]))

    learn = make()
    learn.freeze()
    learn.add_cb(Holds(learn.model[0]))
    find(learn)
    assert set(held) == {(True, False)}


def test_a_loss_with_a_state_keeps_it():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))

        def forward(self, pred, y):
            self.n += 1
            return F.cross_entropy(pred, y)

    learn = make(loss_func=Counts())
    learn.freeze()
    find(learn)
    assert learn.loss_func.n == 0


def test_callbacks_train_in_trials_but_do_not_show():
    seen = []

    class Seen(Callback):
        def before_batch(self):
            seen.append((self.training, hasattr(self.learn, 'mix_up'), hasattr(self.learn, 'save_model'), id(self)))

    learn = make()
    with_callbacks(learn)
    learn.add_cb(seen_by := Seen())
    find(learn)
    assert {s[1] for s in seen} == {True} and {s[2] for s in seen} == {False} and {s[0] for s in seen} == {True, False}
    assert id(seen_by) not in {s[3] for s in seen} and not list(Path('.').rglob('*'))


def test_cost_is_what_was_run():
    seen = []

    class Count(Callback):
        def after_pred(self):
            seen.append(self.training)

    learn = planted(0)
    learn.add_cb(Count())
    found = find(learn, epochs=8)
    full = 4 * 8 * (len(learn.dls.train) + len(learn.dls.valid))
    assert sum(seen) == found.trials['train_batches'].sum() and len(seen) == found.trials[['train_batches', 'valid_batches']].sum().sum()
    assert 0.4 < found.cost <= 0.5 and abs(found.cost * full - len(seen) - 4) < 1e-6


def test_pairs_of_modes_between_frozen_and_trained_layers():
    model = nn.Sequential(*body_and_head()[0], *body_and_head()[1])
    learn = make(model=model, splitter=lambda m: [params(m[:3]), params(m[3:6]), params(m[6:])])
    learn.freeze_to(1)
    everything = Everything(learn)
    found = find(learn, epochs=20)
    assert len(found.evidence) == 16 and found.evidence['rounds'].value_counts().to_dict() == {1: 8, 2: 4, 3: 2, 4: 2}
    below, above = found.suggestion.split(' / ')
    assert found.policy.bn == below and found.policy.mode('4', False) == above and found.policy.mode('8', False) == 'train'
    assert not everything.changed()
    learn.freeze_to_bn(1, **found.policy._asdict())
    assert modes_in_force(learn)['4'] == above


def test_what_the_learner_has_set_for_other_layers_stays():
    learn = make()
    learn.freeze_to_bn(-1, bn_above={'1.*': 'affine-only'})
    assert find(learn).policy.bn_above['1.*'] == 'affine-only'


def test_models_without_statistics():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = make_learner(nn.Sequential(body, head), lr=0.01)
    learn.dls = used_dls()
    learn.freeze()
    found = find(learn)
    assert set(found.evidence['candidate']) == {'train', 'frozen'} and found.shift.empty and len(found.plot().axes) == 1


def test_shift_is_that_of_pretrained_layers():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    learn = make_learner(nn.Sequential(body, head), lr=0.01)
    learn.dls = used_dls()
    body.train()(learn.dls.one_batch()[0])  # stands in for pretraining
    learn.freeze()
    assert list(find(learn).shift['layer']) == ['0.1']


def test_losses_of_many_values_per_sample():
    learn = make_learner(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1)), lr=0.01)
    items = [(torch.randn(3, 8, 8), torch.randint(0, 2, (8, 8))) for _ in range(64)]
    learn.dls = DataLoaders.from_dsets(items, items[:32], bs=8, num_workers=0, device='cpu')
    learn.loss_func = CrossEntropyLossFlat(axis=1)
    recalibrate_bn(learn.model, [torch.stack([x for x, _ in items])], progress=False)
    learn.freeze()
    assert find(learn).evidence['noise'][1:].notna().all()


def iterable(learn):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(items)

    items = list(learn.dls.train_ds)
    learn.dls = DataLoaders(DataLoader(Stream(), 8), DataLoader(items, 8))


def no_validation(learn):
    learn.dls = DataLoaders.from_dsets(list(learn.dls.train_ds), [], bs=8, num_workers=0)


def kept_workers(learn):
    loaders = [DataLoader(list(dl.dataset), 8, num_workers=1, persistent_workers=True) for dl in learn.dls.loaders]
    learn.dls = DataLoaders(*loaders)


def other_model(learn):
    learn.create_opt()
    learn.model = body_and_head()


def kept_graph(learn):
    learn.model[0].kept = learn.model(learn.dls.one_batch()[0])


def bare(learn):
    learn.model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn.opt = None


@pytest.mark.parametrize(
    'spoil,word',
    [
        (iterable, 'no index'),
        (no_validation, 'There have to be batches'),
        (bare, 'nothing to choose'),
        (kept_workers, 'persistent_workers=False'),
        (other_model, 'parameters that the model does not have'),
    ],
    ids=lambda v: getattr(v, '__name__', ''),
)
def test_what_cannot_be_searched_is_refused(spoil, word):
    learn = make()
    spoil(learn)
    everything = Everything(learn)
    with pytest.raises(ValueError, match=word):
        find(learn)
    assert not everything.changed()


def test_a_model_that_keeps_a_graph_is_refused():
    learn = make()
    kept_graph(learn)
    with pytest.raises(ValueError, match='cannot be copied'):
        find(learn)


def test_inside_precompute_it_is_refused():
    learn = make()
    learn.freeze_to_bn(-1)
    with learn.no_bar(), learn.precompute(), pytest.raises(RuntimeError, match='bn_find'):
        learn.bn_find()


def test_all_trials_diverged():
    learn = make(loss_func=lambda pred, y: pred.sum() * float('nan'))
    learn.freeze()
    with pytest.raises(RuntimeError, match='diverged'):
        find(learn)
