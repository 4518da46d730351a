"The callback that re-estimates statistics before each validation: when, for which weights and layers, and what it leaves behind"

import copy, pickle, random, warnings
from functools import partial

import fastai.callback.schedule
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai.torch_core import params, set_seed
from learners import bits, body_and_head, image, label, make_learner, pretrained, same
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import IterableDataset

from bnfreeze_fastai.all import BatchNormFreeze, BatchNormRecalibrate
from bnfreeze_fastai.layers import norm_layers, stats_buffers
from bnfreeze_fastai.stats.distances import snapshot
from bnfreeze_fastai.stats.switch import bn_stats

pytestmark = pytest.mark.filterwarnings('error:Running statistics were not', 'ignore:.*never trained')


def stats(model):
    return {f'{n}.{k}': b.clone() for n, l in norm_layers(model).items() for k, b in stats_buffers(l).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(learn):
    return torch.stack([torch.as_tensor(l) for l in learn.recorder.losses])


class Seen(Callback):
    "Statistics and weights while a validation of a fit runs, by epoch"

    order = 1000

    def __init__(self):
        self.stats, self.weights = {}, {}

    def before_validate(self):
        if not self.learn.lock.locked():
            epoch = len(self.stats)  # a validation inside a fit sets `learn.epoch` to 0
            self.stats[epoch], self.weights[epoch] = stats(self.learn.model), bits(self.learn.model.parameters())


class At(Callback):
    "Call `f(learn)` at one event, in the epochs given"

    def __init__(self, event, f, epochs=(0,), order=0):
        self.f, self.epochs, self.order = f, epochs, order
        setattr(self, event, self.act)

    def act(self):
        if self.epoch in self.epochs:
            self.f(self.learn)


def raises(error):
    def f(learn):
        raise error

    return f


def of_data(model, learn):
    "The statistics of the training data, from each layer's inputs as PyTorch normalises each batch"
    found = {n: [] for n in norm_layers(model)}
    model = copy.deepcopy(model).train()
    hooks = [
        l.register_forward_pre_hook(lambda l, x, n=n: found[n].append(x[0].transpose(0, 1).flatten(1)))
        for n, l in norm_layers(model).items()
    ]
    with torch.no_grad():
        for i in range(0, 24, 8):
            model(torch.stack([image(j, 8) for j in range(i, i + 8)]))
    for h in hooks:
        h.remove()
    return {n: torch.cat(x, 1).double() for n, x in found.items()}


def in_order(learn):
    learn.dls.train.shuffle = False
    return learn


def test_a_validation_has_the_statistics_of_the_training_data_for_its_weights():
    learn, seen = in_order(make_learner()), Seen()
    snaps = {}
    learn.fit(
        2, cbs=[BatchNormRecalibrate(), seen, At('before_validate', lambda l: snaps.update({l.epoch: copy.deepcopy(l.model)}), (0, 1))]
    )
    for epoch, model in snaps.items():
        for n, x in of_data(model, learn).items():
            torch.testing.assert_close(seen.stats[epoch][f'{n}.running_mean'].double(), x.mean(1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen.stats[epoch][f'{n}.running_var'].double(), x.var(1), rtol=1e-4, atol=1e-5)


class Draws(Callback):
    "Note what all random number generators would give next"

    def __init__(self):
        self.next = []

    def before_batch(self):
        if self.training:
            states = random.getstate(), np.random.get_state()
            self.next.append((random.random(), np.random.rand(), self.dls.train.rng.getstate()[1][:5]))
            random.setstate(states[0])
            np.random.set_state(states[1])


def noisy(x):
    return (x[0] + torch.randn_like(x[0]) * np.random.rand() * random.random(), *x[1:])


@pytest.mark.parametrize('how', [dict(), dict(every=2), dict(n_batches=1), dict(keep=True)], ids=str)
@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fine_tune'])
def test_training_is_as_without_it(how, fit):
    found = []
    for cbs in ([], [BatchNormRecalibrate(**how)]):
        learn, draws = make_learner(), Draws()
        learn.dls.train.after_batch = noisy
        set_seed(0)
        learn.dls.train.rng.seed(0)
        getattr(learn, fit)(3, cbs=[draws, *cbs])
        found.append((losses(learn), learn, draws.next))
    (plain, a, drawn), (ours, b, drawn_too) = found
    assert torch.equal(plain, ours) and same(a.model.parameters(), b.model.parameters()) and drawn == drawn_too
    assert equal(stats(a.model), stats(b.model)) != how.get('keep', False)


@pytest.mark.parametrize('every,acts', [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_every_so_many_epochs_and_the_last(every, acts):
    seen, trained = Seen(), Seen()
    make_learner().fit(5, cbs=trained)
    make_learner().fit(5, cbs=[BatchNormRecalibrate(every=every), seen])
    assert [e for e in range(5) if not equal(seen.stats[e], trained.stats[e])] == acts


def test_n_batches_are_the_first_of_the_loader():
    learn, seen = in_order(make_learner()), Seen()
    learn.fit(1, cbs=[BatchNormRecalibrate(n_batches=2), seen])
    assert seen.stats[0]['1.2.num_batches_tracked'] == 2
    x = torch.stack([image(j, 8) for j in range(16)])
    inputs = learn.model[0][0](x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen.stats[0]['0.1.running_mean'], inputs.mean(1))


# What a policy fixes


@pytest.mark.parametrize('mode', ['frozen', 'affine-only', 'stats-only', 'train'])
def test_what_a_policy_fixes_stays(mode):
    learn, seen = pretrained(), Seen()
    learn.freeze_to_bn(-1, bn=mode)
    before = stats(learn.model)
    learn.fit(2, cbs=[BatchNormRecalibrate(), seen])
    moved = {k for k in before if not torch.equal(before[k], seen.stats[1][k])}
    assert {k.rpartition('.')[0] for k in moved} == ({'1.2'} if mode in ('frozen', 'affine-only') else {'0.1', '0.4', '1.2'})


def test_verify_still_sees_a_violation():
    learn = pretrained().freeze_to_bn(-1)
    with pytest.raises(RuntimeError, match='0.1.running_mean'):
        learn.fit(2, cbs=[BatchNormRecalibrate(), At('after_validate', lambda l: l.model[0][1].running_mean.add_(1))])


def test_layers_in_eval_mode_stay():
    learn, seen = pretrained(), Seen()
    learn.freeze()
    learn.train_bn = False
    learn.model[0].requires_grad_(False)
    before = stats(learn.model)
    learn.fit(2, cbs=[BnFreeze(), BatchNormRecalibrate(), seen])
    assert torch.equal(before['0.1.running_mean'], seen.stats[1]['0.1.running_mean'])
    assert not torch.equal(before['1.2.running_mean'], seen.stats[1]['1.2.running_mean'])


def test_a_schedule_that_fixes_statistics():
    learn, seen = make_learner(cbs=BatchNormFreeze(schedule={0.5: dict(bn_above='affine-only')})), Seen()
    before = {}
    learn.fit(4, cbs=[BatchNormRecalibrate(), seen, At('after_train', lambda l: before.update({l.epoch: stats(l.model)}), range(4), 99)])
    assert [equal(seen.stats[e], before[e]) for e in range(4)] == [False, False, True, True]


# Averaged weights


class EMA(Callback):
    "Averaged weights, copied into the model for each validation, and at the end of the fit if so wished"

    order, run_valid = MixedPrecision.order + 1, False

    def __init__(self, back='after_validate', at_end=False):
        self.at_end = at_end
        setattr(self, back, self.swap_back)

    def before_fit(self):
        if not self.learn.lock.locked():
            self.average, self.inside = bits(self.model.parameters()), False

    def after_batch(self):
        for a, p in zip(self.average, self.model.parameters()):
            a.lerp_(p.detach(), 0.3)

    def swap(self):
        self.inside = not self.inside
        for a, p in zip(self.average, self.model.parameters()):
            now = p.detach().clone()
            p.data.copy_(a)
            a.copy_(now)

    def before_validate(self):
        if not self.learn.lock.locked():
            self.swap()

    def swap_back(self):
        if not self.learn.lock.locked() and self.inside:
            self.swap()

    def after_fit(self):
        if self.at_end and not self.learn.lock.locked():
            self.swap()


class EMAModel(Callback):
    "The same as a model of its own, which stands in for the Learner's: the events and order of fastxtend's EMACallback"

    order, run_valid = MixedPrecision.order + 1, False

    def before_fit(self):
        self.ema = copy.deepcopy(self.learn.model).eval()

    def after_batch(self):
        for a, p in zip(self.ema.state_dict().values(), self.learn.model.state_dict().values()):
            a.copy_(a.lerp(p, 0.3) if a.is_floating_point() else p)

    def before_validate(self):
        self.trained, self.learn.model = self.learn.model, self.ema

    def after_validate(self):
        self.learn.model = self.trained

    def after_fit(self):
        self.learn.model = self.ema


@pytest.mark.parametrize('ema', [EMA, partial(EMA, 'before_epoch'), EMAModel])
@pytest.mark.parametrize('policy', [None, 'frozen'])
def test_averaged_weights_are_validated_on_their_own_statistics(ema, policy):
    learn, seen, snaps = in_order(pretrained()), Seen(), []
    if policy:
        learn.freeze_to_bn(-1, bn=policy, bn_above='train')
    cbs = [ema(), BatchNormRecalibrate(), seen, At('before_validate', lambda l: snaps.append(copy.deepcopy(l.model)), (1,), 1001)]
    learn.fit(2, cbs=cbs)
    for n in ['1.2'] if policy else ['0.1']:  # exact for the first layer, and after a frozen body
        x = of_data(snaps[0].eval() if policy else snaps[0], learn)[n] if not policy else head_inputs(snaps[0])
        torch.testing.assert_close(seen.stats[1][f'{n}.running_mean'].double(), x.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.stats[1][f'{n}.running_var'].double(), x.var(1), rtol=1e-4, atol=1e-5)


def head_inputs(model):
    with torch.no_grad():
        x = model[1][:2](model[0].eval()(torch.stack([image(j, 8) for j in range(24)])))
    return x.transpose(0, 1).double()


def test_a_file_has_the_statistics_of_the_weights_in_it(tmp_path):
    "Weights that go back before the file is written take the averaged ones' statistics with them"
    plain, ours = make_learner(path=tmp_path / 'a'), make_learner(path=tmp_path / 'b')
    plain.fit(2, cbs=[EMA(), SaveModelCallback(every_epoch=True)])
    ours.fit(2, cbs=[EMA(), BatchNormRecalibrate(), SaveModelCallback(every_epoch=True)])
    for epoch in (0, 1):
        a, b = (l.load(f'model_{epoch}').model.state_dict() for l in (plain, ours))
        assert equal(a, b)


def test_averages_that_stay_until_the_file_is_written(tmp_path):
    learn, seen = make_learner(path=tmp_path), Seen()
    learn.fit(2, cbs=[EMA('before_epoch'), BatchNormRecalibrate(), seen, SaveModelCallback(every_epoch=True)])
    learn.load('model_0')
    assert equal(stats(learn.model), seen.stats[0]) and same(seen.weights[0], learn.model.parameters())


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('ema', [partial(EMA, at_end=True), EMAModel])
def test_a_fit_that_ends_with_averaged_weights(ema, keep):
    learn = in_order(make_learner())
    learn.fit(2, cbs=[ema(), BatchNormRecalibrate(keep=keep)])
    x = of_data(learn.model, learn)['0.1']
    assert torch.allclose(learn.model[0][1].running_var.double(), x.var(1), rtol=1e-4) == keep


@pytest.mark.parametrize('accumulate', [False, True])
def test_training_goes_on_from_what_is_kept(accumulate):
    "Also where its updates do not count as writes: those of instance norm, and of whole steps"
    learn, seen, trained = make_learner(body_and_head(partial(nn.InstanceNorm2d, track_running_stats=True))), Seen(), {}
    note = At('after_train', lambda l: trained.update({l.epoch: stats(l.model)}), range(4))
    learn.fit(4, cbs=[BatchNormFreeze(accumulate=accumulate), BatchNormRecalibrate(every=2, keep=True), seen, note])
    assert [equal(seen.stats[e], trained[e]) for e in range(4)] == [True, False, True, False]


# Files, and callbacks that judge


def test_files_have_what_was_validated(tmp_path):
    learn, seen = make_learner(path=tmp_path), Seen()
    learn.fit(3, cbs=[BatchNormRecalibrate(), seen, SaveModelCallback(every_epoch=True)])
    for epoch in range(3):
        assert equal(stats(learn.load(f'model_{epoch}').model), seen.stats[epoch])


@pytest.mark.parametrize('best', [0, 1, 2])
@pytest.mark.parametrize('keep', [False, True])
def test_the_best_model_is_loaded_with_its_statistics(tmp_path, best, keep):
    class Chosen(Callback):
        def after_epoch(self):
            self.recorder.values[-1][1] = float(self.epoch != best)

        order = SaveModelCallback.order - 2

    learn, seen = make_learner(path=tmp_path), Seen()
    learn.fit(3, cbs=[BatchNormRecalibrate(keep=keep), seen, Chosen(), SaveModelCallback()])
    assert equal(stats(learn.model), seen.stats[best]) and same(seen.weights[best], learn.model.parameters())


def test_a_file_written_at_the_end(tmp_path):
    learn, seen, trained = make_learner(path=tmp_path), Seen(), {}
    after = At('after_train', lambda l: trained.update(stats(l.model)), (1,))
    learn.fit(2, cbs=[BatchNormRecalibrate(), seen, after, SaveModelCallback(at_end=True)])
    assert equal(stats(learn.model), trained)
    assert equal(stats(learn.load('model').model), seen.stats[1])


def test_early_stopping_ends_with_the_statistics_of_training():
    learn, trained, seen = make_learner(), {}, Seen()
    note = At('after_train', lambda l: trained.update({l.epoch: stats(l.model)}), range(9))
    cbs = [BatchNormRecalibrate(), EarlyStoppingCallback(comp=lambda a, b: False, patience=2), ReduceLROnPlateau(), seen, note]
    learn.fit(9, cbs=cbs)
    assert [*trained] == [0, 1] and equal(stats(learn.model), trained[1]) and not equal(seen.stats[1], trained[1])


# Ways out


ENDINGS = dict(
    error=('after_pred', RuntimeError('x')),
    interrupt=('after_pred', KeyboardInterrupt()),
    error_at_the_start=('before_validate', RuntimeError('x')),
    interrupt_at_the_end=('after_validate', KeyboardInterrupt()),
    interrupt_after=('after_epoch', KeyboardInterrupt()),
    cancel_batches=('after_pred', CancelValidException()),
    cancel_epoch=('after_pred', CancelEpochException()),
    cancel_fit=('after_pred', CancelFitException()),
)


@pytest.mark.parametrize('put_right', ['in fit', 'remove', 'fit again', 'move'])
@pytest.mark.parametrize('order', [0, 99])
@pytest.mark.parametrize('ending', ENDINGS)
def test_ways_out(ending, order, put_right):
    event, error = ENDINGS[ending]
    learn, trained, cb = make_learner(), {}, BatchNormRecalibrate()
    note = At('after_train', lambda l: trained.update(stats(l.model)), (0, 1))
    end = At(event, lambda l: None if l.training else raises(error)(l), (1,), order)
    if put_right != 'in fit':
        learn.add_cb(cb)
    try:
        learn.fit(2, cbs=[note, end, *([cb] if put_right == 'in fit' else [])])
        assert 'cancel' in ending
    except type(error):
        assert 'cancel' not in ending
    if put_right == 'remove':
        learn.remove_cb(cb)
    if put_right == 'move':
        make_learner().add_cb(cb)
    if put_right == 'fit again':
        started = {}
        learn.fit(1, cbs=At('before_train', lambda l: started.update(stats(l.model))))
        assert equal(started, trained)
    else:
        assert equal(stats(learn.model), trained)


def test_ctrl_c_while_re_estimating():
    learn, trained, calls = make_learner(), {}, []

    class Interrupts(nn.Module):
        def forward(self, x):
            if not self.training:
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
            return x

    learn.model[0].append(Interrupts())
    note = At('after_train', lambda l: trained.update(stats(l.model)))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[BatchNormRecalibrate(), note])
    assert equal(stats(learn.model), trained)


def test_others_statistics_stay_theirs():
    learn = make_learner()
    other = {k: v + 1 for k, v in learn.model.state_dict().items()}
    learn.fit(1, cbs=[BatchNormRecalibrate(), At('after_epoch', lambda l: l.model.load_state_dict(other), order=63)])
    assert equal(learn.model.state_dict(), other)


def test_what_writes_and_puts_back_other_statistics_leaves_them_to_training():
    "Here a validation on the statistics of another domain"
    found = []
    for cbs in ([], [BatchNormRecalibrate()]):
        learn = in_order(make_learner())
        start = snapshot(learn.model)

        def look(learn):
            with bn_stats(learn.model, start, layers='0.*'):
                learn.model(learn.dls.valid.one_batch()[0])

        learn.fit(2, cbs=[*cbs, At('after_validate', look, (0, 1), order=80)])
        found.append(stats(learn.model))
    assert equal(*found)


class EMAOfAll(EMA):
    "Swaps the running statistics too, in a way that PyTorch counts or does not"

    def __init__(self, put):
        super().__init__()
        self.put = put

    def tensors(self):
        return [*self.model.parameters(), *(b for b in self.model.buffers() if b.is_floating_point())]

    def before_fit(self):
        self.average, self.inside = bits(self.tensors()), False

    def after_batch(self):
        for a, t in zip(self.average, self.tensors()):
            a.lerp_(t.detach(), 0.3)

    @torch.no_grad()
    def swap(self):
        self.inside = not self.inside
        kept = bits(self.tensors())
        for a, t in zip(self.average, self.tensors()):
            self.put(t, a.clone())
        self.average = kept


def put_data(t, a):
    t.data = a


@pytest.mark.parametrize('put', [torch.Tensor.copy_, lambda t, a: t.data.copy_(a), put_data], ids=['copy_', 'data.copy_', 'data ='])
def test_an_average_that_swaps_statistics_itself(put):
    found = []
    for cbs in ([], [BatchNormRecalibrate()]):
        learn = in_order(make_learner())
        learn.fit(2, cbs=[EMAOfAll(put), *cbs])
        found.append(stats(learn.model))
    assert equal(*found)


@pytest.mark.parametrize('order', [20, 62])
def test_a_file_written_at_the_end_once_the_average_has_left(tmp_path, order):
    plain, ours = make_learner(path=tmp_path / 'a'), make_learner(path=tmp_path / 'b')
    for learn, cbs in ((plain, []), (ours, [BatchNormRecalibrate()])):
        ema = EMA('after_epoch')
        ema.order = order
        in_order(learn).fit(2, cbs=[ema, *cbs, SaveModelCallback(at_end=True)])
    assert equal(*(l.load('model').model.state_dict() for l in (plain, ours)))


def test_weights_put_in_by_a_later_callback():
    ema, learn, models = EMA(), in_order(make_learner()), []
    ema.order = 70
    note = At('after_pred', lambda l: l.training or models.append(copy.deepcopy(l.model)), order=80)
    learn.fit(1, cbs=[ema, BatchNormRecalibrate(), note])
    x = of_data(models[0], learn)['0.1']
    torch.testing.assert_close(models[0][0][1].running_var.double(), x.var(1), rtol=1e-4, atol=1e-5)


def test_a_best_model_that_was_not_re_estimated_ends_exact_if_kept(tmp_path):
    class First(Callback):
        order = SaveModelCallback.order - 2

        def after_epoch(self):
            self.recorder.values[-1][1] = float(self.epoch != 0)

    learn = in_order(make_learner(path=tmp_path))
    learn.fit(2, cbs=[BatchNormRecalibrate(every=2, keep=True), First(), SaveModelCallback()])
    x = of_data(learn.model, learn)['0.1']
    torch.testing.assert_close(learn.model[0][1].running_var.double(), x.var(1), rtol=1e-4, atol=1e-5)


def test_an_averaged_model_that_is_not_the_learners_at_the_end():
    class Beside(EMAModel):
        def after_fit(self):
            pass

    learn = in_order(make_learner())
    learn.fit(2, cbs=[Beside(), BatchNormRecalibrate(keep=True)])
    x = of_data(learn.model, learn)['0.1']
    torch.testing.assert_close(learn.model[0][1].running_var.double(), x.var(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('then', ['lr_find', 'another'])
def test_after_ctrl_c_in_a_validation(tmp_path, then):
    trained, starts = {}, []
    interrupt = At('before_validate', raises(KeyboardInterrupt), order=100)
    learn = make_learner(path=tmp_path, cbs=BatchNormRecalibrate())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[interrupt, At('after_train', lambda l: trained.update(stats(l.model)))])
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, At)])
    if then == 'lr_find':
        learn.lr_find(num_it=4, show_plot=False)
        learn.remove_cb(BatchNormRecalibrate)
        assert equal(stats(learn.model), trained)
    else:
        learn.fit(1, cbs=[BatchNormRecalibrate(), At('before_train', lambda l: starts.append(stats(l.model)))])
        assert equal(starts[0], trained)


class Rearranged(Callback):
    "Does something to every batch before the model sees it"

    order = 3

    def __init__(self, f):
        self.f = f

    def before_batch(self):
        self.learn.xb = (self.f(self.xb[0]),)


def test_what_a_callback_does_to_batches_of_validation_is_told():
    learn = make_learner(cbs=Rearranged(lambda x: 5 * x + 3))
    with pytest.warns(UserWarning, match="'rearranged'. may change batches in validation"):
        learn.fit(1, cbs=BatchNormRecalibrate())


@pytest.mark.filterwarnings('default:Running statistics were not')
def test_a_model_that_cannot_run_on_the_loaders_batches():
    class Permuted(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x.permute(0, 3, 1, 2))

    learn = make_learner(Permuted(body_and_head()), splitter=params, cbs=Rearranged(lambda x: x.permute(0, 2, 3, 1)))
    with pytest.warns(UserWarning, match='not re-estimated, so validation uses those of training: Given groups'):
        learn.fit(1, cbs=BatchNormRecalibrate())


# Copies


@pytest.mark.parametrize(
    'copied', [copy.copy, copy.deepcopy, lambda cb: pickle.loads(pickle.dumps(cb))], ids=['copy', 'deepcopy', 'pickle']
)
def test_a_copy_taken_in_a_validation_carries_nothing(copied):
    learn, cb, taken = make_learner(), BatchNormRecalibrate(2, 3, True), []

    def take(learn):
        held, cb._learn = cb._learn, None
        taken.append(copied(cb))
        cb._learn = held

    learn.fit(2, cbs=[cb, At('after_pred', lambda l: None if l.training or taken else take(l), (1,))])
    assert (taken[0].every, taken[0].n_batches, taken[0].keep) == (2, 3, True)
    assert taken[0]._now is None and taken[0]._names is None and len(taken[0].drift) == 3


@pytest.mark.filterwarnings('ignore:load_learner')
def test_an_exported_learner_has_it(tmp_path):
    learn = make_learner(cbs=BatchNormRecalibrate(every=2))
    learn.fit(1)
    learn.export(tmp_path / 'learner.pkl')
    again, seen = load_learner(tmp_path / 'learner.pkl'), Seen()
    again.dls = learn.dls
    again.fit(1, cbs=seen)
    assert again.batch_norm_recalibrate.every == 2 and not equal(stats(again.model), seen.stats[0])


def test_one_callback_in_two_learners_and_two_in_one():
    one, other, cb = make_learner(), make_learner(), BatchNormRecalibrate()
    one.add_cb(cb)
    one.fit(1)
    other.add_cb(cb)
    assert one.batch_norm_recalibrate is not cb and cb.drift.empty and len(one.batch_norm_recalibrate.drift) == 3
    for learn in (one, other):
        seen, trained = Seen(), {}
        note = At('after_train', lambda l: trained.update(stats(l.model)))
        learn.fit(1, cbs=[seen, note, BatchNormRecalibrate(n_batches=1)])
        assert seen.stats[0]['1.2.num_batches_tracked'] == 1 and equal(stats(learn.model), trained)


# Where it keeps still


def test_it_does_nothing_outside_a_fit():
    learn = make_learner(cbs=BatchNormRecalibrate(keep=True))
    learn.create_opt()
    before = stats(learn.model)
    learn.validate(), learn.get_preds(), learn.get_preds(ds_idx=0, with_loss=True)
    assert equal(stats(learn.model), before)
    learn.lr_find(num_it=6, show_plot=False)
    assert equal(stats(learn.model), before)
    learn.fit(1)
    before = stats(learn.model)
    learn.validate(), learn.get_preds(with_input=True)
    with learn:
        learn.validate()
    assert equal(stats(learn.model), before)


@pytest.mark.parametrize('event', ['after_batch', 'before_epoch', 'after_train', 'after_validate', 'after_epoch'])
def test_a_validation_nested_in_a_fit(event):
    found = []
    for every in (None, 1, 9):
        learn, seen = make_learner(), Seen()
        nested = At(event, lambda l: l.training and l.validate() and l.model.train(), range(3))
        learn.fit(3, cbs=[seen, nested, *([BatchNormRecalibrate(every)] if every else [])])
        found.append((learn.model.state_dict(), [not equal(seen.stats[e], found[0][2].stats[e]) for e in range(3)] if every else [], seen))
    (plain, _, _), (one, all_act, _), (two, last_acts, _) = found
    assert equal(plain, one) and equal(plain, two)
    assert all_act == [True] * 3 and last_acts == [False, False, True]


# Kinds of layers, data and models


@pytest.mark.parametrize(
    'norm',
    [
        partial(nn.BatchNorm2d, momentum=None),
        partial(nn.BatchNorm2d, affine=False),
        partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
        nn.SyncBatchNorm,
        BatchNormAct2d,
    ],
)
def test_kinds_of_layers(norm):
    learn, seen, trained = make_learner(body_and_head(norm)), Seen(), {}
    learn.fit(2, cbs=[BatchNormRecalibrate(), seen, At('after_train', lambda l: trained.update(stats(l.model)), (1,))])
    assert not torch.equal(seen.stats[1]['0.1.running_mean'], trained['0.1.running_mean'])
    assert equal(stats(learn.model), trained)


@pytest.mark.parametrize(
    'norm', [partial(nn.BatchNorm2d, track_running_stats=False), lambda n: nn.GroupNorm(2, n), lambda n: nn.Identity()]
)
def test_layers_without_statistics_beside_one_with(norm):
    learn, seen = make_learner(body_and_head(norm)), Seen()
    learn.fit(1, cbs=[BatchNormRecalibrate(), seen])
    assert seen.stats[0]['1.2.num_batches_tracked'] == 3


def test_without_any_statistics_it_warns_once():
    model = body_and_head(lambda n: nn.Identity())
    model[1][2] = nn.Identity()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        make_learner(model).fit(2, cbs=BatchNormRecalibrate())
    assert ['no norm layer' in str(w.message) for w in told if 're-estimated' in str(w.message)] == [True]


def test_a_batch_that_is_not_finite_warns_and_the_fit_goes_on():
    learn, trained, seen = make_learner(cbs=BatchNormFreeze()), {}, Seen()
    learn.dls.train.after_batch = lambda b: b if learn.model.training else (b[0] * float('nan'), *b[1:])
    note = At('after_train', lambda l: trained.update(stats(l.model)), (0, 1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(2, cbs=[BatchNormRecalibrate(), seen, note])
    assert len([w for w in told if 'not finite' in str(w.message)]) == 1 and equal(seen.stats[1], trained)


def test_several_inputs_and_a_loader_of_pytorch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.lin = nn.BatchNorm1d(4), nn.Linear(8, 2)

        def forward(self, a, b):
            return self.lin(torch.cat([self.bn(a), b], 1))

    items = [(torch.randn(4), torch.randn(4), label(i)) for i in range(16)]
    learn, seen = make_learner(Two(), splitter=lambda m: [[*m.parameters()]]), Seen()
    learn.dls = DataLoaders(*(torch.utils.data.DataLoader(items, batch_size=8) for _ in range(2)))
    learn.fit(1, cbs=[BatchNormRecalibrate(), seen])
    torch.testing.assert_close(seen.stats[0]['bn.running_mean'], torch.stack([a for a, _, _ in items]).mean(0))


def test_an_iterable_dataset():
    class Stream(IterableDataset):
        def __iter__(self):
            return ((image(i, 8), label(i)) for i in range(24))

    learn, seen = make_learner(), Seen()
    learn.dls = DataLoaders(DataLoader(Stream(), bs=8, n=24), learn.dls.valid)
    learn.fit(1, cbs=[BatchNormRecalibrate(), seen])
    assert seen.stats[0]['1.2.num_batches_tracked'] == 3


def test_data_parallel_and_compiled():
    for wrap in (nn.DataParallel, partial(torch.compile, backend='eager')):
        learn, seen, trained = make_learner(), Seen(), {}
        learn.model, learn.splitter = wrap(learn.model), lambda m: [[*m.parameters()]]
        learn.fit(1, cbs=[BatchNormRecalibrate(), seen, At('after_train', lambda l: trained.update(stats(l.model)))])
        assert seen.stats[0]['1.2.num_batches_tracked'] == 3 and not equal(seen.stats[0], trained) and equal(stats(learn.model), trained)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('precision', ['to_fp16', 'to_bf16'])
def test_mixed_precision(precision):
    learn, seen = getattr(make_learner(), precision)(), Seen()
    learn.fit(1, cbs=[BatchNormRecalibrate(), seen])
    assert seen.stats[0]['1.2.num_batches_tracked'] == 3


def test_mixup_is_left_out():
    learn, seen, snaps = in_order(make_learner()), Seen(), []
    learn.fit(1, cbs=[MixUp(), BatchNormRecalibrate(), seen, At('before_validate', lambda l: snaps.append(copy.deepcopy(l.model)))])
    torch.testing.assert_close(seen.stats[0]['0.1.running_mean'].double(), of_data(snaps[0], learn)['0.1'].mean(1), rtol=1e-4, atol=1e-5)


def test_within_precompute_the_head_alone_is_re_estimated():
    found = []
    for precompute in (False, True):
        learn, seen = pretrained().freeze_to_bn(-1), Seen()
        before = stats(learn.model)
        learn.dls.train.rng.seed(0)
        if precompute:
            with learn.precompute():
                learn.fit(2, cbs=[BatchNormRecalibrate(), seen])
        else:
            learn.fit(2, cbs=[BatchNormRecalibrate(), seen])
        assert all(torch.equal(before[k], v) for k, v in seen.stats[1].items() if k.startswith('0.'))
        found.append(seen.stats[1])
    for k, v in found[0].items():
        torch.testing.assert_close(v, found[1][k], rtol=1e-4, atol=1e-5)
    with learn.fold_frozen():
        learn.fit(1, cbs=BatchNormRecalibrate())


def test_progress_bars_go_on():
    learn, bars = make_learner(), []
    learn.add_cb(ProgressCallback())

    class Bars(Callback):
        order = 1001

        def before_validate(self):
            bars.append(self.progress.mbar.child is self.progress.pbar)

    learn.fit(2, cbs=[BatchNormRecalibrate(), Bars()])
    assert bars == [True, True]


# Settings


@pytest.mark.parametrize(
    'wrong',
    [
        dict(every=0),
        dict(every=1.5),
        dict(every=None),
        dict(every=True),
        dict(every='2'),
        dict(n_batches=0),
        dict(n_batches='all'),
        dict(keep=1),
    ],
    ids=str,
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=f'`{next(iter(wrong))}` has to be'):
        BatchNormRecalibrate(**wrong)
    BatchNormRecalibrate(every=np.int64(2), n_batches=np.int64(2))


class Interrupts(Callback):
    def after_validate(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    'then', [lambda learn: learn.remove_cb(BatchNormRecalibrate), lambda learn: learn.fit(1, 0)], ids=['removed', 'fit']
)
@pytest.mark.parametrize('writes', [lambda learn: learn.recalibrate_bn(), lambda learn: learn.load('kept')], ids=['re-estimated', 'loaded'])
def test_what_somebody_writes_after_an_interrupted_fit_stays(writes, then):
    learn = pretrained(cbs=BatchNormRecalibrate())
    learn.freeze_to_bn(0, bn_above='train')
    learn.save('kept')
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupts())
    writes(learn)
    learn.freeze_to_bn(0, bn_above='affine-only')
    stats = bits(b for l in norm_layers(learn.model).values() for b in stats_buffers(l).values())
    then(learn)
    assert same(stats, [b for l in norm_layers(learn.model).values() for b in stats_buffers(l).values()])
