"What the callback guarantees beyond the matrix of modes and events"

import copy, pickle, warnings

import cloudpickle, pytest, torch
import fastai.callback.schedule
from conftest import Body, may_move
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze
from fastai.learner import load_learner
from fastai.torch_core import params, set_seed, trainable_params
from learners import bits, body_and_head, make_learner, OPTIMIZERS, same, two_groups
from torch import nn

from bnfreeze_fastai.freeze.callback import active_callback, BatchNormFreeze
from bnfreeze_fastai.layers import bn_layers, MODES

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained', 'ignore:load_learner')


def trained(**kwargs):
    learn = make_learner(**kwargs)
    learn.fit(1)
    return learn


class At(Callback):
    "Call `f(learn)` at one event of one epoch"

    def __init__(self, event, f, epoch=0):
        self.f, self.at = f, epoch
        setattr(self, event, self.act)

    def act(self):
        if self.training and self.epoch == self.at and self.train_iter % 3 == 1 or self.f.__name__ == 'always':
            self.f(self.learn)


# The freeze point


@pytest.mark.parametrize('n', [0, 1])
def test_a_group_of_norm_layers_follows_the_last_freeze_point_after_create_opt(n):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    learn = trained(model=model).freeze_to_bn(n, throughout=False)
    learn.create_opt()
    for _ in range(2):
        body = Body(nn.Sequential(model[0]))
        learn.fit(1)
        assert body.moved() == (set() if n else {'stats', 'affine'})
    learn.unfreeze()
    learn.fit(1)
    assert body.moved() == {'stats', 'affine'}


def test_what_another_callback_thaws_or_freezes_counts_from_the_next_epoch():
    learn = trained().freeze_to_bn(-1, throughout=False)
    body, seen = Body(learn.model[0]), []
    learn.add_cb(Recording(seen, body))
    learn.fit(3, cbs=[At('after_batch', lambda learn: learn.unfreeze(), 0), At('after_batch', lambda learn: learn.freeze(), 1)])
    assert seen[0] == set() and seen[1] == {'stats', 'affine', 'others'}
    body.before = {k: bits(v) for k, v in body.parts(learn.model[0]).items()}
    learn.fit(1)
    assert body.moved() == set()


def test_a_policy_changed_inside_a_fit_counts_from_the_next_epoch():
    learn = trained().freeze_to_bn(-1)
    body, seen = Body(learn.model[0]), []
    learn.add_cb(Recording(seen, body))
    learn.fit(2, cbs=At('after_batch', lambda learn: learn.freeze_to_bn(0, bn_above='affine-only')))
    assert seen == [set(), {'affine', 'others'}]
    learn.remove_cb(Recording)
    learn.fit(2, cbs=At('after_batch', lambda learn: learn.freeze_to_bn(-1, bn='frozen')))
    body = Body(learn.model[0])
    learn.fit(1)
    assert body.moved() == set()


def test_the_policy_is_there_before_anything_else_in_a_fit():
    "Callbacks that wrap the model read `requires_grad` in `before_fit`; some run forward passes before the first batch"
    learn, seen = trained(), []

    class Early(Callback):
        order = 0

        def look(self):
            seen.append(any(p.requires_grad for p in self.learn.model[0].parameters()))
            self.learn.model.train()(torch.randn(4, 3, 8, 8))

        def before_fit(self):
            self.look()

        def before_train(self):
            self.look()

        def after_train(self):
            for p in self.learn.model.parameters():
                p.data.mul_(2)

        def before_validate(self):
            for p in self.learn.model.parameters():
                p.data.div_(2)

    learn.add_cbs([BatchNormFreeze(), Early()])
    learn.freeze()
    body = Body(learn.model[0])
    learn.fit(2)
    assert seen == [False] * 3 and body.moved() == set()


class Recording(Callback):
    def __init__(self, seen, body):
        self.seen, self.body = seen, body

    def after_epoch(self):
        self.seen.append(self.body.moved())


@pytest.mark.guarantee(3)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_default_splitter_keeps_every_parameter_through_create_opt_and_export(mode, opt):
    learn = trained(splitter=trainable_params, opt_func=OPTIMIZERS[opt]).freeze_to_bn(0, bn_above=mode)
    everything = len(list(learn.model.parameters()))
    body = Body(learn.model[0])
    learn.fit(1)
    learn.export('e.pkl')
    assert len(learn.opt.all_params()) == everything
    learn.fit(1, reset_opt=True)
    assert not body.moved() - may_move(mode) - {'others'}
    loaded = load_learner('e.pkl')
    loaded.dls = learn.dls
    loaded.freeze_to_bn(0, bn_above='train')
    loaded.fit(1)
    assert body.moved(loaded.model[0]) == {'stats', 'affine', 'others'} and len(loaded.opt.all_params()) == everything


def test_parameters_frozen_by_hand_before_are_left_out_as_ever():
    model = body_and_head()
    model[0][1].requires_grad_(False)
    learn = make_learner(model=model, splitter=trainable_params).freeze_to_bn(0)
    learn.fit(1)
    assert not any(p.requires_grad for p in model[0][1].parameters()) and len(learn.opt.all_params()) == len(list(model.parameters())) - 2


# Removing, replacing, copying


@pytest.mark.guarantee(4)
@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('n', [0, 1])
def test_removing_restores_what_fastai_would_have_set(train_bn, n):
    plain = make_learner(train_bn=train_bn)
    plain.freeze_to(n)
    for mode in MODES:
        learn = make_learner(train_bn=train_bn).freeze_to_bn(n, bn=mode, bn_above=mode)
        splitter = learn.splitter
        learn.fit(1)
        learn.remove_cb(BatchNormFreeze)
        assert [p.requires_grad for p in learn.model.parameters()] == [p.requires_grad for p in plain.model.parameters()]
        assert learn.splitter is two_groups and splitter is not two_groups
        body = Body(learn.model[0])
        learn.fit(1)
        assert 'stats' in body.moved()


@pytest.mark.guarantee(6)
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_callback_given_to_fit_wins_and_leaves(error):
    learn = trained().freeze_to_bn(-1)
    own, flags = active_callback(learn), [p.requires_grad for p in learn.model.parameters()]
    body = Body(learn.model[0])
    learn.fit(1, cbs=BatchNormFreeze(bn='train'))
    assert body.moved() == {'stats', 'affine'}

    def fail(learn):
        raise error('stop')

    with pytest.raises(error):
        learn.fit(1, cbs=[BatchNormFreeze(bn='train'), At('after_pred', fail)])
    assert active_callback(learn) is own and flags == [p.requires_grad for p in learn.model.parameters()]
    body = Body(learn.model[0])
    learn.fit(1)
    assert body.moved() == set()


@pytest.mark.guarantee(4)
def test_removing_after_an_interrupt_lets_go():
    def fail(learn):
        raise KeyboardInterrupt

    learn = trained().freeze_to_bn(-1)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=At('after_pred', fail))
    learn.remove_cb(BatchNormFreeze)
    assert not any(l._forward_pre_hooks for l in bn_layers(learn.model)) and all(m.training for m in learn.model.modules())
    body = Body(learn.model[0])
    learn.model(learn.dls.one_batch()[0])
    assert body.moved() == {'stats'}


@pytest.mark.guarantee(4)
def test_copies_taken_in_a_fit_hold_nothing():
    copies = []

    def take(learn):
        copies.extend([copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))])

    def always(learn):
        copies.append(cloudpickle.loads(cloudpickle.dumps(learn)).model)

    learn = trained().freeze_to_bn(-1)
    learn.fit(1, cbs=[At('after_pred', take), At('after_epoch', always)])
    assert len(copies) == 3
    for model in copies:
        body = Body(model[0])
        model.train()(torch.randn(4, 3, 8, 8))
        assert body.moved() == {'stats'}


def test_outside_a_fit_the_model_is_free():
    learn = trained().freeze_to_bn(-1)
    learn.fit(1)
    body = Body(learn.model[0])
    learn.model.train()(torch.randn(4, 3, 8, 8))
    assert body.moved() == {'stats'}


@pytest.mark.guarantee(2)
def test_validation_is_untouched():
    learn, plain = trained().freeze_to_bn(-1), trained()
    plain.freeze()
    for l in (learn, plain):
        l.model.load_state_dict(plain.model.state_dict())
    assert learn.validate() == plain.validate()
    assert torch.equal(learn.get_preds()[0], plain.get_preds()[0])


def test_training_trajectory_is_fastais_where_the_mode_is():
    "Mode 'train' is what plain fastai does, step by step"
    plain, learn = make_learner(), make_learner()
    plain.freeze()
    learn.freeze_to_bn(-1, bn='train')
    for l in (plain, learn):
        set_seed(1)
        l.fit(2)
    assert same(plain.model.state_dict().values(), learn.model.state_dict().values())


# Verification


def write(tensor):
    return lambda learn: tensor(learn.model).data.add_(1e-3)


@pytest.mark.guarantee(5)
@pytest.mark.parametrize(
    'name,tensor',
    {
        '0.0.weight': lambda m: m[0][0].weight,
        '0.1.weight': lambda m: m[0][1].weight,
        '0.4.bias': lambda m: m[0][4].bias,
        '0.1.running_var': lambda m: m[0][1].running_var,
    }.items(),
)
@pytest.mark.parametrize('event', ['after_pred', 'after_step', 'after_batch'])
def test_a_change_is_reported_by_name(name, tensor, event):
    learn = trained().freeze_to_bn(-1)
    with pytest.raises(RuntimeError, match=rf"\['{name}'\]"):
        learn.fit(1, cbs=At(event, write(tensor)))
    learn.fit(1)
    active_callback(learn).verify = False
    learn.fit(1, cbs=At(event, write(tensor)))


def test_a_change_between_epochs_is_reported():
    learn = trained().freeze_to_bn(-1)

    def always(learn):
        write(lambda m: m[0][1].bias)(learn)

    with pytest.raises(RuntimeError, match='0.1.bias'):
        learn.fit(2, cbs=At('after_epoch', always))


def test_changes_of_what_may_move_are_none_of_its_business():
    learn = trained().freeze_to_bn(-1, bn='stats-only')
    learn.fit(1, cbs=At('after_batch', write(lambda m: m[0][1].running_mean)))


@pytest.mark.guarantee(5)
def test_cancelled_epochs_and_fits_are_verified_too():
    from fastai.callback.core import CancelEpochException, CancelFitException

    for error in (CancelEpochException, CancelFitException):

        def spoil(learn):
            write(lambda m: m[0][1].bias)(learn)
            raise error

        with pytest.raises(RuntimeError, match='0.1.bias'):
            trained().freeze_to_bn(-1).fit(1, cbs=At('after_batch', spoil))


@pytest.mark.guarantee(5)
@pytest.mark.parametrize('order', [-100, 100])
def test_a_fit_that_stops_early_is_verified_to_its_end(order):
    from fastai.callback.core import CancelFitException

    class StopEarly(Callback):
        writes = False

        def after_validate(self):
            if self.writes:
                write(lambda m: m[0][1].bias)(self.learn)

        def after_epoch(self):
            raise CancelFitException

    stop = StopEarly()
    stop.order = order
    learn = trained().freeze_to_bn(-1)
    learn.fit(3, cbs=stop)
    stop.writes = True
    with pytest.raises(RuntimeError, match='0.1.bias'):
        learn.fit(3, cbs=stop)


@pytest.mark.guarantee(5)
def test_an_averaging_callback_may_swap_weights():
    class Swap(Callback):
        "Validates with noise in place of the weights, as an average would stand there"

        order = -100

        def swap_in(self):
            self.kept = copy.deepcopy(self.learn.model.state_dict())
            for p in self.learn.model.parameters():
                p.data.mul_(0.99)

        def before_validate(self):
            self.swap_in()

        def after_validate(self):
            self.learn.model.load_state_dict(self.kept)

        def after_fit(self):
            if self.training is False and not self.learn.lock.locked():
                self.swap_in()

    learn = trained().freeze_to_bn(-1)
    learn.add_cb(Swap())
    learn.fit(2)
    learn.fit(2)


# Company


@pytest.mark.guarantee(6)
def test_fastais_own_callback_beside_it_is_warned_of():
    learn = trained(cbs=BnFreeze()).freeze_to_bn(-1)
    with pytest.warns(UserWarning, match='BnFreeze'):
        learn.fit(1)


@pytest.mark.filterwarnings('default:.*never trained')
def test_warnings_come_once_and_name_the_layers():
    model = body_and_head()
    model[0][4] = nn.BatchNorm2d(4, track_running_stats=False)
    learn = make_learner(model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.freeze_to_bn(-1)
        learn.fit(2)
        learn.freeze_to_bn(-1)
        learn.fit(2)
    texts = [str(w.message) for w in caught if 'BatchNorm' in str(w.message) or 'normalise' in str(w.message)]
    assert len(texts) == 2 and "['0.4']" in texts[0] and "['0.1']" in texts[1]


def test_attributes_of_the_model_are_not_shadowed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)
            self.bn_above, self.policy, self.since, self.verify = (nn.Identity() for _ in range(4))

        def forward(self, x):
            return self.head(self.bn(x).mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*never trained')
        make_learner(model=Net(), splitter=lambda m: [params(m.bn), params(m.head)], cbs=BatchNormFreeze()).freeze_to_bn(
            -1, bn='train'
        ).fit(1)


def test_compiled_model_follows_every_change_of_mode():
    torch.compiler.reset()
    learn = make_learner().freeze_to_bn(-1)
    learn.model = torch.compile(learn.model, backend='eager')
    for mode in ['train', 'frozen', 'train', 'stats-only', 'affine-only', 'frozen']:
        learn.freeze_to_bn(-1, bn=mode)
        body = Body(learn.model._orig_mod[0])
        learn.fit(1)
        assert body.moved() == may_move(mode), mode


def test_data_parallel():
    learn = trained()
    learn.model = nn.DataParallel(learn.model)
    learn.splitter = lambda m: two_groups(m.module)
    learn.create_opt()
    learn.freeze_to_bn(-1)
    body = Body(learn.model.module[0])
    learn.fit(1)
    assert body.moved() == set() and list(active_callback(learn).modes()) == ['0.1', '0.4', '1.2']


@pytest.mark.parametrize(
    'make',
    [
        nn.LazyBatchNorm2d,
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda: nn.GroupNorm(2, 4),
    ],
)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.filterwarnings('ignore:Lazy modules')
def test_layer_kinds_in_fits(make, mode):
    learn = make_learner(model=body_and_head(norm=lambda n: make()))
    learn.fit(1)
    learn.freeze_to_bn(-1, bn=mode)
    body = Body(learn.model[0])
    learn.fit(2)
    has = {half for half, tensors in body.parts(learn.model[0]).items() if tensors}
    assert body.moved() == may_move(mode) & has


@pytest.mark.filterwarnings('ignore:Lazy modules')
def test_lazy_layers_from_the_first_batch_on():
    learn = make_learner(model=body_and_head(norm=lambda n: nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match='run a batch'):
        learn.freeze_to_bn(-1)
    assert active_callback(learn) is None
    learn.fit(1, cbs=BatchNormFreeze(bn_above={'0.1': 'frozen', '0.4': 'affine-only'}))
    first, second = bn_layers(learn.model[0])
    assert all(float(l.num_batches_tracked) == 0 and not l.running_mean.any() for l in (first, second))
    assert (first.weight == 1).all() and not first.bias.any() and second.bias.any()


def test_norm_layer_as_the_whole_model():
    class Root(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).mean((2, 3))

    learn = make_learner(model=Root(3), splitter=trainable_params).freeze_to_bn(0, bn_above='train')
    learn.fit(1)
    learn.freeze_to_bn(0, bn_above='affine-only')
    before = bits(learn.model.buffers())
    learn.fit(1)
    assert same(before, learn.model.buffers()) and list(learn.bn_summary().df['layer']) == ['']
