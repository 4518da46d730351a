"The search for a mode: right on planted problems, and the Learner notices nothing"

import copy, random
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper, ranger, SGD
from fastai.torch_core import params, set_seed
from learners import bits, body_and_head, make_dls, make_learner, two_groups
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import bnfreeze_fastai.choose.find
from bnfreeze_fastai.freeze.callback import active_callback
from bnfreeze_fastai.choose.rules import ADVICE, expected_gains, REFERENCE, TRIED
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn

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


def find(learn, epochs=8, fit='fit_one_cycle', **kwargs):
    with learn.no_bar():
        return learn.bn_find(epochs, fit, plot=False, **kwargs)


@pytest.mark.parametrize(
    'problem,right',
    [
        pytest.param(FAR, ('fastai',), id='far'),
        pytest.param(SMALL_BATCHES, ('affine-only', 'converted'), id='small batches', marks=pytest.mark.long),
    ],
)
def test_trials_overrule_the_rule_where_they_are_clear(problem, right):
    found = [find(planted(seed, **problem), epochs=20) for seed in range(10)]
    assert sum(f.suggestion in right for f in found) >= 9, [(f.suggestion, f.gain) for f in found]


def test_gain_and_interval_belong_to_the_suggestion():
    found = find(planted(0))
    row = found.table.set_index('policy').loc[found.suggestion]
    assert (found.gain, found.low, found.high) == tuple(row[['expected', 'low', 'high']]) and found.low < found.gain < found.high
    assert {*found.table['policy'][found.table['loss'].notna()]} == {*TRIED['head']}


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
    assert not everything.changed() and found.suggestion in {*found.table['policy']}


RATES = {
    'head': [(-1, None), (-1, 0.1)],
    'fine_tune': [(0, slice(1e-4, 1e-2))],
    'full': [(0, 0.1), (0, slice(1e-2)), (0, slice(1e-3, 1e-2))],
}


@pytest.mark.parametrize('phase,n,lr', [(phase, *how) for phase, ways in RATES.items() for how in ways])
def test_phase_follows_from_freeze_point_and_learning_rate(phase, n, lr):
    learn = make()
    learn.freeze_to(n)
    everything = Everything(learn)
    found = find(learn, lr=lr, epochs=10)
    assert not everything.changed() and {*found.table['policy']} == {REFERENCE[phase], *ADVICE[phase]['advantage']}


def test_fine_tune_is_a_phase_of_its_own_at_any_freeze_point():
    for n in (0, -1):
        learn = make()
        learn.freeze_to(n)
        found = find(learn, epochs=10, fit='fine_tune')
        alone = expected_gains('fine_tune', 8).set_index('policy')['alone']
        assert (found.by_rule, found.freeze_to) == ('affine-only', -1) and found.table.set_index('policy')[
            'alone'
        ].to_dict() == alone.to_dict()


@pytest.mark.parametrize('fit,lr', [('fine_tune', None), ('fit_one_cycle', slice(1e-5, 1e-3))])
def test_slices_over_three_groups_are_the_phase_of_fine_tune(fit, lr):
    learn = make(splitter=lambda m: [params(m[0][:2]), params(m[0][2:]), params(m[1])])
    assert find(learn, epochs=10, fit=fit, lr=lr).by_rule == 'affine-only'


@pytest.mark.parametrize('wrap', [lambda opt: opt, lambda opt: lambda params, **_: opt], ids=['itself', 'by a function'])
def test_an_optimizer_that_was_made_for_the_model_is_refused(wrap):
    learn = make()
    learn.opt_func = wrap(OptimWrapper(opt=torch.optim.AdamW(learn.model.parameters())))
    everything = Everything(learn)
    with pytest.raises(ValueError, match='made beforehand.*partial'):
        find(learn)
    assert not everything.changed()


def test_a_model_that_is_frozen_as_a_whole():
    learn = make()
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='nothing would train'):
        find(learn)


class Breaks(Callback):
    "Lets trials with a policy of ours diverge"

    run_valid = False

    def after_step(self):
        if active_callback(self.learn) is not None:
            self.model[1][-1].weight.data.fill_(float('nan'))


def test_a_trial_that_diverged_has_no_accuracy_and_is_not_suggested():
    learn = make()
    learn.add_cb(Breaks())
    found = find(learn, epochs=10, fit='fine_tune')
    table = found.table.set_index('policy')
    assert found.suggestion == 'fastai' and found.gain == 0 and "Diverged, so left out: 'affine-only', 'converted'" in found.why
    assert table.loc[['affine-only', 'converted'], 'accuracy'].isna().all() and np.isinf(table.loc['affine-only', 'loss'])


class Sees(Callback):
    seen = []

    def before_batch(self):
        self.seen.append((type(self.learn) is Half, len(self.xb[0])))
        self.learn.notes.append(self.iter)


class Half(Learner):
    "Sees half of each batch, by an attribute of its own"

    def _split(self, b):
        super()._split(b)
        self.xb, self.yb = (self.xb[0][: self.part],), (self.yb[0][: self.part],)


def test_a_trial_is_of_the_class_of_the_learner_with_what_it_has():
    learn = make()
    learn.__class__, learn.part, learn.notes = Half, 4, []
    learn.add_cb(Sees())
    find(learn, epochs=10)
    assert {*Sees.seen} == {(True, 4), (True, 2)} and learn.notes == []  # two samples show what the task is


def test_errors_of_ones_own_are_no_unknown_task():
    class Fails(Callback):
        def after_pred(self):
            if not self.training:
                raise ValueError('my bug')

    learn = make()
    learn.add_cb(Fails())
    with pytest.raises(ValueError, match='my bug'):
        find(learn)


def test_few_validation_samples_widen_the_interval():
    table = find(make(), epochs=10, fit='fine_tune').table.set_index('policy')  # validates on eight samples
    of_rows = expected_gains('fine_tune', 8, table['accuracy'].dropna().to_dict()).set_index('policy')
    assert table.loc['affine-only', 'low'] < of_rows.loc['affine-only', 'low'] - 5


class Raises(Callback):
    order = 90

    def __init__(self, error):
        self.error = error

    def after_pred(self):
        Raises.count += 1
        if Raises.count == 15:
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
    assert Raises.count == 15 and not everything.changed()


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
    a, b = (find(planted(0)).table for _ in range(2))
    assert a.equals(b)


def seen_in_trials(learn, **how):
    "Per trial, `(training?, input, learning rate of the head)` of each batch"
    seen = []

    class See(Callback):
        def before_train(self):
            seen.append([])

        def after_pred(self):
            if seen:  # before, the search looks whether the task has classes
                seen[-1].append((self.training, self.xb[0].clone(), self.learn.opt.hypers[-1]['lr']))

    learn.add_cb(See())
    return find(learn, **how), seen


def test_all_candidates_see_the_same_at_the_same_rates():
    found, (first, *others) = seen_in_trials(planted(0, n=64, bs=8), lr=0.1)
    assert len(others) == len(TRIED['head']) - 1
    for other in others:
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(first, other, strict=True))
    rates = [lr for training, _, lr in first if training]
    assert max(rates) == pytest.approx(0.1, rel=0.1) and rates[-1] < 0.01  # the whole schedule, with its annealing


def test_trials_have_two_fifths_of_a_run():
    learn = planted(0)
    found, seen = seen_in_trials(learn, epochs=10)
    full = 10 * len(learn.dls.train)
    assert sum(training for trial in seen for training, *_ in trial) == 3 * int(0.4 * full / 3)
    assert found.full_seconds > 0 and found.seconds > 0


def test_a_run_too_short_to_divide_follows_the_rule():
    found, seen = seen_in_trials(planted(0), epochs=1)
    assert not seen and found.suggestion == found.by_rule == 'affine-only' and 'too short' in found.why and np.isnan(found.full_seconds)
    assert found.low < found.gain < found.high


def test_statistics_forget_the_old_as_in_a_full_run():
    seen = set()

    class See(Callback):
        def before_batch(self):
            seen.add(self.learn.model[0][1].momentum)

    learn = planted(0)
    learn.add_cb(See())
    find(learn)
    full = 8 * len(learn.dls.train)
    n = int(0.4 * full / 3)
    seen.discard(0.1)  # of the conversion, which averages over all batches
    assert len(seen) == 1 and (1 - seen.pop()) ** n == pytest.approx(max(0.9**full, 0.01))


def test_trials_do_not_depend_on_the_policy_that_the_learner_had():
    tables = []
    for had in (False, True):
        learn = planted(0)
        if had:
            learn.freeze_to_bn(-1, bn='stats-only')
        tables.append(find(learn).table)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(
    'suggestion,modes', [('fastai', None), ('affine-only', 'affine-only'), ('frozen', 'frozen'), ('converted', 'train')]
)
def test_what_is_found_is_applied_and_holds_once_unfrozen(suggestion, modes):
    learn = planted(0)
    found = find(learn)._replace(suggestion=suggestion)
    before = [b.clone() for b in learn.model.buffers()]
    assert found.apply(learn) is learn and learn.opt.frozen_idx == 1
    converted = not all(map(torch.equal, before, learn.model.buffers()))
    assert converted == (suggestion == 'converted')
    learn.unfreeze()
    assert {*learn.bn_summary().df['mode']} == {modes or 'train'}


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


def test_models_without_statistics_have_nothing_to_choose():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    learn = make_learner(nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))), lr=0.01)
    learn.dls = used_dls()
    with pytest.raises(ValueError, match='nothing to choose'):
        find(learn)


def segmentation(learn):
    items = [(torch.randn(3, 8, 8), torch.randint(0, 2, (8, 8))) for _ in range(64)]
    learn.dls = DataLoaders.from_dsets(items, items[:32], bs=8, num_workers=0, device='cpu')
    learn.model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
    learn.loss_func = CrossEntropyLossFlat(axis=1)


def regression(learn):
    items = [(x, torch.randn(2)) for x, _ in learn.dls.train_ds]
    learn.dls = DataLoaders.from_dsets(items, items[:32], bs=8, num_workers=0, device='cpu')
    learn.loss_func = F.mse_loss


def several_labels(learn):
    items = [(x, torch.rand(2).round()) for x, _ in learn.dls.train_ds]
    learn.dls = DataLoaders.from_dsets(items, items[:32], bs=8, num_workers=0, device='cpu')
    learn.loss_func = F.binary_cross_entropy_with_logits


@pytest.mark.parametrize('task', [segmentation, regression, several_labels], ids=lambda f: f.__name__)
def test_other_tasks_than_classes_follow_the_rule_and_promise_no_gain(task):
    learn = make()
    task(learn)
    recalibrate_bn(learn.model, [(x,) for x, _ in learn.dls.train], progress=False)
    learn.create_opt()
    learn.freeze()
    everything = Everything(learn)
    found = find(learn)
    assert (
        found.suggestion == found.by_rule
        and 'one class for each sample' in found.why
        and np.isnan([found.gain, found.low, found.high]).all()
    )
    assert not everything.changed() and 'points' not in repr(found).split('To set it')[0]


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


def test_a_distributed_fit_is_refused():
    class DistributedTrainer(Callback):
        "As fastai's, which needs accelerate"

    with pytest.raises(ValueError, match='distributed fit'):
        make_learner(cbs=DistributedTrainer()).bn_find()
