"Statistics of a step: those of the batch that the accumulated ones stand for, whatever happens on the way"

import copy, itertools, pickle, sys, warnings
from functools import partial

import cloudpickle, pytest, torch
import torch.nn.functional as F
import fastai.callback.schedule
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from learners import bits, body_and_head, make_learner, pretrained, same
from timm.layers import BatchNormAct2d
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from bnfreeze_fastai.all import BatchNormFreeze, BatchNormRecalibrate
from bnfreeze_fastai.core import held_stats
from bnfreeze_fastai.holds import holds_on
from bnfreeze_fastai.layers import norm_layers, stats_buffers
from bnfreeze_fastai.stats.accumulate import StepStats

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
CLOSE = dict(rtol=1e-5, atol=1e-6)


def stats(model):
    return {f'{n}.{k}': b.clone() for n, l in norm_layers(model).items() for k, b in stats_buffers(l).items()}


def close(a, b):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], msg=lambda m: f'{k}: {m}', **CLOSE)


class Steps(Callback):
    "The statistics after each batch of training, and whether the optimizer stepped"

    order, run_valid = 1000, False

    def __init__(self):
        self.after, self.stepped = [], []

    def before_batch(self):
        self.now = False

    def after_step(self):
        self.now = True

    def after_batch(self):
        self.after.append(stats(self.learn.model))
        self.stepped.append(self.now)

    @property
    def at_steps(self):
        return [s for s, stepped in zip(self.after, self.stepped) if stepped]


def data(n, width=3):
    "Samples whose level rises, so that batches differ"
    set_seed(1)
    return [(torch.randn(width, 4, 4) + i / 4, torch.tensor(i % 2)) for i in range(n)]


def first_layer(norm=nn.BatchNorm2d):
    return nn.Sequential(norm(3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))


def learner(model, bs, n=24, **kwargs):
    learn = make_learner(model, splitter=lambda m: [[*m.parameters()]], **kwargs)
    items = data(n)
    learn.dls = DataLoaders(*(torch.utils.data.DataLoader(items, batch_size=bs) for _ in range(2)))
    return learn


def fitted(model, bs, n_acc=None, accumulate=True, epochs=2, n=24, cbs=(), **kwargs):
    learn, steps = learner(copy.deepcopy(model), bs, n, **kwargs), Steps()
    acc = [] if n_acc is None else [GradientAccumulation(n_acc)]
    learn.fit(epochs, cbs=[BatchNormFreeze(accumulate=accumulate), *acc, steps, *cbs])
    return learn, steps


NORMS = dict(
    batch=nn.BatchNorm2d,
    momentum=partial(nn.BatchNorm2d, momentum=0.4),
    cumulative=partial(nn.BatchNorm2d, momentum=None),
    no_affine=partial(nn.BatchNorm2d, affine=False),
    instance=partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    instance_without_momentum=partial(nn.InstanceNorm2d, track_running_stats=True, momentum=None),
    sync=nn.SyncBatchNorm,
    timm=BatchNormAct2d,
    untracked=partial(nn.BatchNorm2d, track_running_stats=False),
    double=partial(nn.BatchNorm2d, dtype=torch.float64),
)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('bs', [4, 6, 12])
def test_a_step_has_the_statistics_of_the_batch_that_it_stands_for(norm, bs):
    model = first_layer(NORMS[norm])
    if norm == 'double':
        model.double()
    kwargs = dict(cbs=[AsDouble()]) if norm == 'double' else {}
    _, big = fitted(model, 12, accumulate=False, **kwargs)
    _, ours = fitted(model, bs, 12, **kwargs)
    assert len(big.at_steps) == len(ours.at_steps) == 4
    for a, b in zip(big.at_steps, ours.at_steps):
        close(a, b)


class AsDouble(Callback):
    def before_batch(self):
        self.learn.xb = tuple(x.double() for x in self.xb)


def test_other_dimensions():
    for norm, shape in ((nn.BatchNorm1d, (3,)), (nn.BatchNorm1d, (3, 5)), (nn.BatchNorm3d, (3, 2, 2, 2))):
        x = torch.randn(12, *shape)
        big, small = norm(3), norm(3)
        big(x)
        steps = StepStats()
        with steps.on({'': small}, small):
            for part in x.split([7, 3, 2]):
                steps.begin()
                small(input=part)
            steps.commit()
        close(stats(big), stats(small))
        assert small.momentum == 0.1 and not small._forward_hooks and not small._forward_pre_hooks


class CtrlC:
    "Raises in the `at`th call of `f`, after the layer has written its statistics or before"

    def __init__(self, f, at, after):
        self.f, self.at, self.after, self.calls = f, at, after, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        result = self.f(*args, **kwargs) if self.after or self.calls != self.at else None
        if self.calls == self.at:
            raise KeyboardInterrupt
        return result


def test_a_loop_that_goes_on_after_ctrl_c(monkeypatch):
    "In a layer, where PyTorch then calls no forward hook"
    x, y = torch.randn(8, 3), torch.randn(8, 3)
    bn, one, steps = nn.BatchNorm1d(3), nn.BatchNorm1d(3), StepStats()
    one(y)
    with steps.on({'': bn}, bn):
        steps.begin()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(F, 'batch_norm', CtrlC(F.batch_norm, 1, True))
            bn(x)
        steps.begin()
        bn(y)
        steps.commit()
    close(stats(bn), stats(one))
    assert bn.momentum == 0.1


@pytest.mark.guarantee(4)
@pytest.mark.parametrize('norm', ['batch', 'momentum', 'cumulative', 'instance', 'timm'])
@pytest.mark.parametrize('after', [False, True])
def test_ctrl_c_in_a_layer_leaves_everything_right_at_once(norm, after, monkeypatch):
    model = first_layer(NORMS[norm])
    learn, steps = learner(model, 4), Steps()
    momentum, name = model[0].momentum, 'instance_norm' if norm == 'instance' else 'batch_norm'
    learn.add_cb(BatchNormFreeze(accumulate=True))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(F, name, CtrlC(getattr(F, name), 5, after))
        learn.fit(1, cbs=[GradientAccumulation(12), steps])
    for o in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nn.Sequential(copy.copy(model[0]))):
        assert o[0].momentum == momentum and ('forward' in vars(o[0])) is (o is model)
        close(stats(o), steps.after[-1])
    learn.bn_shift()
    close(stats(model), steps.after[-1])
    good = {k: v.clone() for k, v in first_layer(NORMS[norm]).state_dict().items()}
    model.load_state_dict(good)
    learn.remove_cb(BatchNormFreeze)
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    assert model[0].momentum == momentum and 'forward' not in vars(model[0]) and not model[0]._forward_pre_hooks


def test_ctrl_c_at_any_call_inside_a_layer():
    "Also on the way out: Python looks for signals where something is called"
    x, bn, steps = torch.randn(8, 3), nn.BatchNorm1d(3), StepStats()
    before, here, raised, left = stats(bn), sys._getframe(), 0, 0

    def interrupt(frame, event, arg):
        nonlocal left
        left -= frame is not here
        if left == 0 and frame is not here:
            raise KeyboardInterrupt

    with steps.on({'': bn}, bn):
        while not left:  # the call was over before its turn came
            steps.begin()
            left = raised + 1
            sys.setprofile(interrupt)
            try:
                bn(x)
            except KeyboardInterrupt:
                raised += 1
            finally:
                sys.setprofile(None)
            assert bn.momentum == 0.1 and all(torch.equal(v, before[k]) for k, v in stats(bn).items()), raised
    assert raised > 50


def test_no_cancellation():
    "Squares of such values have no digits left for their variance; what is left is the rounding of each batch's mean"
    set_seed(0)
    x = (torch.randn(64, 2, dtype=torch.float64) * 1e-2 + 1e3).float()
    bn, steps = nn.BatchNorm1d(2, momentum=1.0), StepStats()
    with steps.on({'': bn}, bn):
        for part in x.split(16):
            steps.begin()
            bn(part)
        steps.commit()
    torch.testing.assert_close(bn.running_var.double(), x.double().var(0), rtol=1e-2, atol=0)


def test_the_count_goes_on_across_epochs_and_with_uneven_batches():
    "Batches of 8, 8 and 4: steps after 16, then 4+8+8, and so on, as fastai counts"
    _, steps = fitted(first_layer(), 8, 16, epochs=3, n=20)
    assert steps.stepped == [False, True, False, False, True, False, False, True, False]
    images = torch.stack([x for x, _ in data(20)])
    batches = [images[i : i + 8] for i in (0, 8, 16)] * 3
    bn, groups = nn.BatchNorm2d(3), [batches[:2], batches[2:5], batches[5:8]]
    for group, found in zip(groups, steps.at_steps, strict=True):
        bn(torch.cat(group))
        close({f'0.{k}': b for k, b in stats_buffers(bn).items()}, found)


@pytest.mark.parametrize('model', [body_and_head, first_layer])
def test_without_accumulation_it_is_plain_training(model):
    found, model = [], model()
    for accumulate in (False, True):
        learn, steps = make_learner(copy.deepcopy(model), splitter=lambda m: [[*m.parameters()]]), Steps()
        learn.fit(3, cbs=[BatchNormFreeze(accumulate=accumulate), steps])
        found.append((learn, steps))
    (plain, a), (ours, b) = found
    for x, y in zip(a.after, b.after, strict=True):
        close(x, y)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), ours.model.parameters()))  # statistics do not enter training


def test_a_validation_between_steps_sees_the_last_step():
    seen = []

    class Validates(Callback):
        run_valid = False

        def after_batch(self):
            before = stats(self.learn.model)
            self.learn.get_preds(dl=[b for b in self.dls.valid][:1], inner=True, reorder=False)
            self.learn.model.train()
            self.learn.training = True
            assert all(torch.equal(v, before[k]) for k, v in stats(self.learn.model).items())
            seen.append(before)

    model = first_layer()
    _, steps = fitted(model, 4, 12, cbs=[Validates()])
    _, plain = fitted(model, 4, 12)
    assert steps.stepped == plain.stepped == [False, False, True] * 4
    for a, b in zip(seen, plain.after):
        close(a, b)
    for i in (1, 4, 7):
        assert all(torch.equal(steps.after[i][k], steps.after[i - 1][k]) for k in steps.after[i])


def test_what_is_left_at_the_end_leaves_no_trace():
    learn, steps = fitted(first_layer(), 4, 16, epochs=1)
    assert steps.stepped == [False, False, False, True, False, False]
    close(stats(learn.model), steps.after[3])
    learn.fit(1, cbs=[BatchNormFreeze(accumulate=True), GradientAccumulation(24)])
    assert learn.model[0].num_batches_tracked == 2


# Layers that are called more than once


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

    def forward(self, x):
        return self.head(self.bn(x) + self.bn(2 * x + 1))


@pytest.mark.parametrize('bs', [4, 12])
def test_a_layer_called_twice(bs):
    model = Twice()
    _, big = fitted(model, 12, accumulate=False)
    _, ours = fitted(model, bs, 12)
    for a, b in zip(big.at_steps, ours.at_steps, strict=True):
        close(a, b)
    assert ours.after[-1]['bn.num_batches_tracked'] == 8


class Ghost(nn.BatchNorm2d):
    "Normalises parts of the batch"

    def forward(self, x):
        return torch.cat([super(Ghost, self).forward(part) for part in x.split(2)])


class CallsItself(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) if len(x) <= 2 else torch.cat([self(part) for part in x.split(2)])


@pytest.mark.parametrize('norm', [Ghost, CallsItself])
def test_a_layer_that_updates_several_times_in_a_call_is_refused(norm):
    model = first_layer(norm)
    learn = learner(model, 4)
    before = bits(model.state_dict().values())
    with pytest.raises(ValueError, match=r"\['0'\] update their running statistics several times.*without `accumulate=True`"):
        learn.fit(1, cbs=[BatchNormFreeze(accumulate=True), GradientAccumulation(12)])
    assert same(before, model.state_dict().values()) and model[0].momentum == 0.1
    learn.fit(1, cbs=[BatchNormFreeze(bn_above='affine-only', accumulate=True), GradientAccumulation(12)])
    parts = learner(first_layer(norm), 2)
    parts.fit(1, cbs=[BatchNormFreeze(accumulate=True), GradientAccumulation(12)])  # once a call
    assert parts.model[0].num_batches_tracked == 2


class Uncounted(nn.BatchNorm2d):
    "As many a layer of users"

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)


class LargeOnly(nn.BatchNorm2d):
    "Normalises small batches by what is stored"

    def forward(self, x):
        if len(x) > 4:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)


def test_a_call_that_updates_nothing_does_not_count_as_one_that_does():
    images = torch.stack([x for x, _ in data(20)])
    for norm, large in ((Uncounted, images), (LargeOnly, images[:16])):
        bn, one, steps = norm(3), norm(3), StepStats()
        with steps.on({'': bn}, bn):
            for part in images.split(8):
                steps.begin()
                bn(part)
            steps.commit()
        one(large)
        close(stats(bn), stats(one))


def own_forward(x):
    return x * 2


def test_blocks_that_end_in_any_order_and_a_forward_of_the_layers_own():
    bn, steps = nn.BatchNorm1d(3), [StepStats(), StepStats(), StepStats()]
    for own, order in itertools.product((False, True), itertools.permutations(range(3))):
        if own:
            bn.forward = own_forward
        blocks = [s.on({'': bn}, bn) for s in steps]
        for block in blocks:
            block.__enter__()
        for i in order:
            blocks[i].__exit__(None, None, None)
        assert vars(bn).get('forward') is (own_forward if own else None) and not bn._forward_pre_hooks


@pytest.mark.guarantee(4)
def test_copies_keep_a_forward_of_the_layers_own():
    model = first_layer()
    model[0].forward = own_forward
    with held_stats({model[0]: 'train'}), StepStats().on({'0': model[0]}, model):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again[0].forward is own_forward and not again[0]._forward_pre_hooks


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = first_layer(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.guarantee(9)
@pytest.mark.parametrize('reentrant', [False, True])
def test_a_pass_that_is_recomputed_does_not_count(reentrant):
    _, plain = fitted(first_layer(), 4, 12)
    _, ours = fitted(Checkpointed(reentrant), 4, 12)
    for a, b in zip(plain.after, ours.after, strict=True):
        close({f'inner.{k}': v for k, v in a.items()}, b)


def test_a_second_pass_of_a_callback_counts_as_in_plain_training():
    "As sharpness-aware optimizers make one, at perturbed weights"

    class Again(Callback):
        run_valid = False

        def after_backward(self):
            with torch.no_grad():
                self.learn.model(*self.xb)

    model = first_layer()
    _, big = fitted(model, 12, accumulate=False, cbs=[Again()])
    _, ours = fitted(model, 4, 12, cbs=[Again()])
    for a, b in zip(big.at_steps, ours.at_steps, strict=True):
        close(a, b)


# Batches that are spoilt, skipped or cancelled


@pytest.mark.guarantee(8)
@pytest.mark.parametrize('bad', [0, 1, 2])
def test_a_batch_that_is_not_finite_is_left_out_and_told(bad):
    class Spoils(Callback):
        run_valid = False

        def before_batch(self):
            if self.train_iter == bad:
                self.learn.xb = (self.xb[0] / 0,)

        def after_loss(self):
            self.learn.loss_grad = torch.where(self.loss_grad.isfinite(), self.loss_grad, self.loss_grad * 0).nan_to_num()

        def before_step(self):
            for p in self.learn.model.parameters():
                p.grad.nan_to_num_()

        order = -20

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn, steps = fitted(first_layer(), 4, 12, epochs=1, cbs=[Spoils()])
    told = [str(w.message) for w in told if 'not finite' in str(w.message)]
    assert len(told) == 2 and f'Batch {bad} of epoch 0' in told[0] and "['0']" in told[0] and told[1].startswith('1 of 6')
    bn, images = nn.BatchNorm2d(3), torch.stack([x for x, _ in data(24)])
    bn(torch.cat([images[i : i + 4] for i in (0, 4, 8) if i != 4 * bad]))
    close({f'0.{k}': b for k, b in stats_buffers(bn).items()}, steps.at_steps[0])


def test_a_step_that_is_skipped_ends_its_group():
    "As a gradient scaler skips one: the gradients are dropped, and the large batch would have moved the statistics"

    class Skips(Callback):
        order = 10

        def before_step(self):
            if self.train_iter == 2:
                raise CancelStepException

    _, plain = fitted(first_layer(), 4, 12)
    _, ours = fitted(first_layer(), 4, 12, cbs=[Skips()])
    for a, b in zip(plain.after, ours.after, strict=True):
        close(a, b)


@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt()])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'before_step', 'after_batch', 'inside'])
def test_after_an_error_nothing_is_pending(event, error):
    class Fails(Callback):
        order = 0  # before fastai cancels the batch in `before_step`

    def fail(*args):
        if cb.training and cb.train_iter == 1:
            raise error

    cb = Fails()
    model = first_layer()
    if event == 'inside':
        model[0].forward = lambda x: (fail(), nn.BatchNorm2d.forward(model[0], x), fail())[1]
    else:
        setattr(cb, event, fail)
    learn = learner(model, 4)
    learn.add_cb(BatchNormFreeze(accumulate=True))
    with pytest.raises(type(error)):
        learn.fit(1, cbs=[GradientAccumulation(12), cb])
    model[0].__dict__.pop('forward', None)
    steps = Steps()
    learn.fit(1, cbs=[GradientAccumulation(24), steps])
    bn = nn.BatchNorm2d(3)
    bn(torch.stack([x for x, _ in data(24)]))
    close({f'0.{k}': b for k, b in stats_buffers(bn).items()}, steps.at_steps[0])
    learn.remove_cb(BatchNormFreeze)
    assert model[0].momentum == 0.1 and not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_removing_the_callback_after_ctrl_c_in_a_layer():
    model = first_layer()

    def forward(x):
        nn.BatchNorm2d.forward(model[0], x)
        raise KeyboardInterrupt

    learn = learner(model, 4)
    before = stats(model)
    model[0].forward = forward
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=BatchNormFreeze(accumulate=True))
    close(stats(model), before)
    assert model[0].momentum == 0.1


# Policies, schedules, tools


@pytest.mark.guarantee(1)
@pytest.mark.parametrize('mode', ['frozen', 'affine-only', 'stats-only', 'train'])
def test_only_statistics_that_train_are_accumulated(mode):
    learn, steps = pretrained(), Steps()
    before = stats(learn.model)
    cb = BatchNormFreeze(mode, accumulate=True)
    learn.freeze()
    learn.fit(2, cbs=[cb, GradientAccumulation(16), steps])
    moved = {k.rpartition('.')[0] for k, v in stats(learn.model).items() if not torch.equal(v, before[k])}
    assert moved == ({'1.2'} if mode in ('frozen', 'affine-only') else {'0.1', '0.4', '1.2'})


def test_verify_sees_a_violation():
    class Saboteur(Callback):
        def after_batch(self):
            self.learn.model[0][1].running_mean += 1

    learn = pretrained()
    learn.freeze()
    with pytest.raises(RuntimeError, match='0.1.running_mean'):
        learn.fit(1, cbs=[BatchNormFreeze(accumulate=True), GradientAccumulation(16), Saboteur()])


def test_what_a_schedule_fixes_amid_a_step_is_dropped():
    learn, steps = learner(first_layer(), 4), Steps()
    cb = BatchNormFreeze(accumulate=True, schedule={0.5: dict(bn_above='affine-only')})
    learn.fit(1, cbs=[cb, GradientAccumulation(16), steps])  # a step would come after batch 3, the change before it
    assert steps.stepped[3] and all(torch.equal(steps.after[-1][k], steps.after[0][k]) for k in steps.after[0])
    assert learn.model[0].num_batches_tracked == 0


def test_a_schedule_does_not_lose_a_step_of_others():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    learn, steps = learner(model, 4), Steps()
    cb = BatchNormFreeze(accumulate=True, schedule={0.5: dict(bn_above={'0': 'train', '*': 'affine-only'})})
    learn.fit(1, cbs=[cb, GradientAccumulation(16), steps])
    bn = nn.BatchNorm2d(3)
    bn(torch.stack([x for x, _ in data(16)]))
    close({f'0.{k}': b for k, b in stats_buffers(bn).items()}, {k: v for k, v in steps.after[-1].items() if k.startswith('0.')})


def test_lr_find_leaves_no_trace():
    learn = make_learner(cbs=[BatchNormFreeze(accumulate=True), GradientAccumulation(16)])
    learn.create_opt()
    before = stats(learn.model)
    learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in stats(learn.model).items())
    learn.fit_one_cycle(1)
    learn.fine_tune(1)


@pytest.mark.guarantee(10)
@pytest.mark.parametrize('event', ['after_train', 'after_validate', 'after_epoch', 'after_fit'])
def test_update_bn_works_between_batches(event):
    class Updates(Callback):
        def update(self):
            if self.learn.lock.locked():
                return
            mode = self.learn.model.training
            update_bn([x for x, _ in self.dls.train], self.learn.model)
            self.learn.model.train(mode)

    cb = Updates()
    setattr(cb, event, cb.update)
    found = []
    for accumulate in (False, True):
        learn = learner(first_layer(), 4)
        learn.fit(1, cbs=[BatchNormFreeze(accumulate=accumulate), GradientAccumulation(12), cb])
        found.append(stats(learn.model))
    close(*found)


def test_copies_and_pickles_taken_in_a_batch_carry_nothing():
    taken = []

    class Copies(Callback):
        run_valid = False

        def after_pred(self):
            taken.extend([copy.deepcopy(self.learn.model), cloudpickle.loads(cloudpickle.dumps(self.learn.model))])
            taken.append(copy.copy(self.batch_norm_freeze))

    fitted(first_layer(), 4, 12, epochs=1, cbs=[Copies()])
    for o in taken:
        if isinstance(o, nn.Module):
            assert not o[0]._forward_hooks and not o[0]._forward_pre_hooks and o[0].momentum == 0.1
            assert 'forward' not in vars(o[0])
            o.train()(torch.randn(4, 3, 4, 4))
            assert o[0].num_batches_tracked in (1, 2)
        else:
            assert o.accumulate and not o.attachment.fits


def test_an_older_pickle_does_not_accumulate(tmp_path):
    cb = BatchNormFreeze()
    del cb.__dict__['accumulate']
    again = pickle.loads(pickle.dumps(cb))
    assert again.accumulate is False
    make_learner().fit(1, cbs=again)


@pytest.mark.filterwarnings('ignore:load_learner')
def test_an_exported_learner_accumulates(tmp_path):
    learn = make_learner(cbs=BatchNormFreeze(accumulate=True))
    learn.fit(1)
    learn.export(tmp_path / 'learner.pkl')
    again = load_learner(tmp_path / 'learner.pkl')
    again.dls = learn.dls
    again.fit(2, cbs=GradientAccumulation(24))
    assert learn.model[0][1].num_batches_tracked == 3 and again.model[0][1].num_batches_tracked == 5


def test_a_batch_that_is_cancelled_goes_into_the_next_step():
    class Cancels(Callback):
        run_valid = False

        def after_loss(self):
            if self.train_iter == 0:
                raise CancelBatchException

    learn, steps = fitted(first_layer(), 12, epochs=1, cbs=[Cancels()])
    assert steps.stepped == [False, True] and learn.model[0].num_batches_tracked == 1
    bn = nn.BatchNorm2d(3)
    bn(torch.stack([x for x, _ in data(24)]))
    close({f'0.{k}': b for k, b in stats_buffers(bn).items()}, stats(learn.model))


# Beside re-estimation


@pytest.mark.parametrize('keep', [False, True])
def test_beside_re_estimation(keep):
    "A re-estimation amid a step: its passes are no batches, and what is pending goes on from the statistics that are there"
    model = first_layer()
    learn, steps = fitted(model, 4, 16, epochs=2, cbs=[BatchNormRecalibrate(keep=keep)])
    _, plain = fitted(model, 4, 16, epochs=2)
    assert steps.stepped == plain.stepped == [i % 4 == 3 for i in range(12)]
    if not keep:
        for a, b in zip(steps.after, plain.after, strict=True):
            close(a, b)
        return
    images = torch.stack([x for x, _ in data(24)])
    bn = nn.BatchNorm2d(3, momentum=1.0)
    bn(images)
    bn.momentum = 0.1
    for group in (torch.cat([images[16:], images[:8]]), images[8:]):
        bn(group)
    close(
        {f'0.{k}': b for k, b in stats_buffers(bn).items() if 'num' not in k}, {k: v for k, v in steps.after[-1].items() if 'num' not in k}
    )
    bn.momentum = 1.0
    bn(images)
    close(
        {f'0.{k}': b for k, b in stats_buffers(bn).items() if 'num' not in k},
        {k: v for k, v in stats(learn.model).items() if 'num' not in k},
    )


# What is refused


def test_compiled_and_spread_models_are_refused():
    learn = learner(first_layer(), 4)
    learn.model = torch.compile(learn.model, backend='eager')
    with pytest.raises(ValueError, match='compile it afterwards') as told:  # a traceback keeps what it has seen
        learn.fit(1, cbs=BatchNormFreeze('stats-only', 'affine-only', accumulate=True))
    assert told.tb is not None and not any(holds_on(l) for l in norm_layers(learn.model).values())
    spread = nn.DataParallel(first_layer())
    spread.device_ids = [0, 1]
    for model in (spread, nn.Sequential(spread)):
        with pytest.raises(ValueError, match='one device'), StepStats().on({}, model):
            pass
    bn = nn.BatchNorm2d(3)
    with StepStats().on({'': bn}, bn), pytest.raises(ValueError, match='one device'):
        bn._replicate_for_data_parallel()(torch.randn(4, 3, 4, 4))  # as `DataParallel` does, wrapped since


@pytest.mark.parametrize('wrong', [1, None, 'step', 16])
def test_a_wrong_setting(wrong):
    with pytest.raises(ValueError, match='`accumulate` has to be True or False'):
        BatchNormFreeze(accumulate=wrong)
