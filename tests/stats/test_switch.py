"Statistics put back and switched: whole or not at all, to the bit, whatever the layers and the model around them"

import copy, pickle

import pytest, timm, torch
from fastai.callback.core import Callback
from learners import bits, body_and_head, make_learner, same
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.core import hold_bn_mode, set_bn_mode
from bnfreeze_fastai.freeze.callback import BatchNormFreeze
from bnfreeze_fastai.layers import norm_layers, stats_buffers
from bnfreeze_fastai.stats.distances import bn_drift, snapshot
from bnfreeze_fastai.stats.switch import bn_restore, bn_stats, flat_snapshot

pytestmark = pytest.mark.filterwarnings('ignore:.*never trained')
X2, X3, X1 = torch.randn(6, 4, 5, 5), torch.randn(6, 4, 3, 3, 3), torch.randn(6, 4)


def stats(model):
    return [b for l in norm_layers(model).values() for b in stats_buffers(l).values()]


def moved(model, times=1):
    "The statistics of a model after more training batches"
    for _ in range(times):
        model.train()(torch.randn(6, 3, 8, 8) * 3 + 1)
    return model


def trained():
    torch.manual_seed(0)
    return moved(body_and_head())


LAYERS = {
    '1d': (lambda: nn.BatchNorm1d(4), X1),
    '2d': (lambda: nn.BatchNorm2d(4), X2),
    '3d': (lambda: nn.BatchNorm3d(4), X3),
    'timm': (lambda: timm.layers.BatchNormAct2d(4), X2),
    'instance': (lambda: nn.InstanceNorm2d(4, track_running_stats=True), X2),
    'no affine': (lambda: nn.BatchNorm2d(4, affine=False), X2),
    'cumulative': (lambda: nn.BatchNorm2d(4, momentum=None), X2),
    'bfloat16': (lambda: nn.BatchNorm2d(4).bfloat16(), X2.bfloat16()),
    'double': (lambda: nn.BatchNorm2d(4).double(), X2.double()),
    'lazy': (lambda: nn.LazyBatchNorm2d(), X2),
}


@pytest.mark.parametrize('case', LAYERS)
def test_every_layer_to_the_bit(case):
    make, x = LAYERS[case]
    layer = make()
    layer(x)
    model = nn.Sequential(layer)
    before, taken = bits(stats(model)), snapshot(model)
    layer(x * 3 + 1)
    after, buffers = bits(stats(model)), stats(model)
    with bn_stats(model, taken) as inside:
        assert inside is model and same(before, stats(model))
    assert same(after, stats(model))
    bn_restore(model, pickle.loads(pickle.dumps(taken)))
    assert same(before, stats(model)) and all(a is b for a, b in zip(buffers, stats(model)))
    bn_restore(layer, flat_snapshot(snapshot(layer)))  # a layer alone, whose name is empty
    assert same(before, stats(model))


def test_a_cumulative_average_goes_on_from_its_count():
    layer = nn.BatchNorm1d(4, momentum=None)
    layer(X1)
    taken = snapshot(layer)
    for _ in range(3):
        layer(torch.randn(6, 4))
    bn_restore(layer, taken)
    layer(X1 + 1)
    torch.testing.assert_close(layer.running_mean, X1.mean(0) + 0.5)


def test_statistics_alone_are_put_back():
    model = trained()
    taken = snapshot(model)
    moved(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    weights, flags = bits(model.parameters()), [p.requires_grad for p in model.parameters()]
    model.eval()
    bn_restore(model, taken)
    assert same(weights, model.parameters()) and flags == [p.requires_grad for p in model.parameters()]
    assert not any(m.training for m in model.modules())


def test_snapshots_from_before_the_count_was_kept():
    model = trained()
    old = {n: {k: t for k, t in s.items() if k != 'num_batches_tracked'} for n, s in snapshot(model).items()}
    moved(model)
    assert (bn_drift(model, old).kl > 0).all()
    before = bits(stats(model))
    with bn_stats(model, old):
        moved(model)
    assert same(before, stats(model))
    bn_restore(model, old)
    assert (bn_drift(model, old).kl == 0).all() and model[0][1].num_batches_tracked == 2


def test_saved_and_loaded(tmp_path):
    model = trained()
    before = bits(stats(model))
    torch.save(snapshot(model), tmp_path / 'a.pth')
    torch.save(model.state_dict(), tmp_path / 'all.pth')
    for name in ('a.pth', 'all.pth'):
        bn_restore(moved(model), torch.load(tmp_path / name, weights_only=True))
        assert same(before, stats(model))


def test_saved_as_safetensors(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch', reason='safetensors is optional')
    model = trained()
    before = bits(stats(model))
    safetensors.save_file(flat_snapshot(snapshot(model)), tmp_path / 'a.safetensors')
    bn_restore(moved(model), safetensors.load_file(tmp_path / 'a.safetensors'))
    assert same(before, stats(model))


def other_body():
    return nn.Sequential(body_and_head()[0], nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)))


MISFITS = {
    'a layer is missing': (lambda m: {n: s for n, s in snapshot(m).items() if n != '1.2'}, r"lacks statistics of \['1.2'\]"),
    'half of one': (lambda m: snapshot(m) | {'0.1': {'running_mean': torch.zeros(4)}}, r"lacks statistics of \['0.1'\]"),
    'one too many': (lambda m: snapshot(m) | {'2': snapshot(m)['0.1']}, r"no running statistics for \['2'\]"),
    'another shape': (lambda m: snapshot(m) | {'1.2': snapshot(nn.BatchNorm1d(5))['']}, r'1.2.running_mean has shape \(5,\), here \(4,\)'),
    'another model': (lambda m: snapshot(other_body()), r"lacks statistics of \['1.2'\]; .* for \['1.1'\]"),
    'flat': (lambda m: flat_snapshot(snapshot(nn.BatchNorm2d(4))), 'lacks statistics'),
    'empty': (lambda m: {}, 'lacks statistics'),
    'none': (lambda m: None, '`snapshot` has to be a snapshot.* not None'),
    'the model': (lambda m: m, '`snapshot` has to be a snapshot.* not a Sequential'),
    'a list': (lambda m: [snapshot(m)], '`snapshot` has to be a snapshot'),
    'names that are none': (lambda m: dict(enumerate(m.state_dict().values())), '`snapshot` has to be a snapshot'),
    'numbers as names': (lambda m: dict(enumerate(snapshot(m).values())), 'lacks statistics'),
    'numbers': (lambda m: {'0.1': {'running_mean': 0.0}}, '`snapshot` has to be a snapshot'),
}


@pytest.mark.parametrize('case', MISFITS)
def test_what_does_not_fit_is_refused_before_anything_changes(case):
    make, said = MISFITS[case]
    model = trained()
    given = make(model)
    before = bits(stats(moved(model)))
    for f in (bn_restore, lambda *args: bn_stats(*args).__enter__()):
        with pytest.raises(ValueError, match=said):
            f(model, given)
        assert same(before, stats(model))


def test_models_and_globs_that_do_not_fit():
    model = trained()
    taken = snapshot(model)
    with pytest.raises(ValueError, match='Learner.*give its `.model`'):
        bn_restore(make_learner(), taken)
    with pytest.raises(ValueError, match='matches no norm layer'):
        bn_restore(model, taken, layers='body.*')
    with pytest.raises(ValueError, match='nothing to measure|keeps running statistics'):
        bn_restore(nn.Sequential(nn.Linear(2, 2)), taken)
    with pytest.raises(ValueError, match='lazy'):
        bn_restore(nn.Sequential(nn.LazyBatchNorm1d()), taken)
    model[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"no running statistics for \['0.1'\]"):
        bn_restore(model, taken)


def test_a_new_head_is_left_out_by_a_glob():
    model, other = trained(), moved(nn.Sequential(body_and_head()[0], nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))))
    head = bits(stats(other[1]))
    bn_restore(other, snapshot(model), layers='0.*')
    assert same(bits(stats(model[0])), stats(other[0])) and same(head, stats(other[1]))


def test_values_that_the_type_cannot_hold():
    layer = nn.BatchNorm1d(4).half()
    before = bits(stats(layer))
    taken = snapshot(nn.BatchNorm1d(4))
    taken['']['running_var'] *= 1e6
    with pytest.raises(ValueError, match='running_var.*too large'):
        bn_restore(layer, taken)
    assert same(before, stats(layer))


def test_statistics_that_are_not_finite_come_back_too():
    layer = nn.BatchNorm1d(4)
    layer.running_mean[0], layer.running_var[1] = float('nan'), float('inf')
    taken = snapshot(layer)
    layer.reset_running_stats()
    bn_restore(layer, taken)
    assert layer.running_mean[0].isnan() and layer.running_var[1].isinf()


class InsideInterrupted(nn.BatchNorm2d):
    "Its statistics cannot be reached at the `at`th time"

    at = -1

    def __getattr__(self, name):
        if name == 'running_var' and self.__dict__.get('at', -1) >= 0:
            self.__dict__['at'] -= 1
            if self.__dict__['at'] < 0:
                raise self.__dict__['error']
        return super().__getattr__(name)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('no memory')])
def test_never_half(error):
    "Whenever the error comes, the statistics are all old or all new"
    model = nn.Sequential(nn.BatchNorm2d(4), InsideInterrupted(4))
    taken = snapshot(model)
    model(X2 * 3 + 1)
    old, raised = bits(stats(model)), 0
    for at in range(1, 20):
        model[1].__dict__.update(at=at, error=error)
        try:
            bn_restore(model, taken)
        except type(error):
            raised += 1
        model[1].__dict__['at'] = -1
        whole = same(old, stats(model)) or (bn_drift(model, taken).kl == 0).all()
        assert whole, at
        model(X2 * 3 + 1)
        old = bits(stats(model))
    assert 2 < raised < 19


def test_ctrl_c_on_the_way_out():
    model = nn.Sequential(nn.BatchNorm2d(4), InsideInterrupted(4))
    taken = snapshot(model)
    model(X2 * 3 + 1)
    before = bits(stats(model))
    with pytest.raises(KeyboardInterrupt), bn_stats(model, taken):
        model[1].__dict__.update(at=0, error=KeyboardInterrupt())
    assert same(before, stats(model))


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_block(error):
    model = trained()
    taken = snapshot(model)
    before = bits(stats(moved(model)))
    with pytest.raises(error), bn_stats(model, taken):
        moved(model)
        raise error
    assert same(before, stats(model))


def test_nested_and_used_twice():
    model = trained()
    first = snapshot(model)
    second = snapshot(moved(model))
    before = bits(stats(moved(model)))
    for _ in range(2):
        with bn_stats(model, first):
            with bn_stats(model, second):
                assert (bn_drift(model, second).kl == 0).all()
            assert (bn_drift(model, first).kl == 0).all()
    assert same(before, stats(model))


def test_training_and_moving_inside_the_block():
    model = trained()
    taken = snapshot(model)
    before = bits(stats(moved(model)))
    with bn_stats(model, taken):
        inside = copy.deepcopy(model)
        moved(model.double().float())  # new buffers
        assert (bn_drift(model, taken).kl > 0).all()
    assert same(before, stats(model)) and (bn_drift(inside, taken).kl == 0).all()


def test_backward_after_the_block_is_an_error_and_not_a_wrong_gradient():
    model = trained()
    taken = snapshot(model)
    moved(model).eval()
    x = torch.randn(2, 3, 8, 8)
    with bn_stats(model, taken):
        model(x).sum().backward()
    with bn_stats(model, taken):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def averaged(model):
    return AveragedModel(model, use_buffers=True)


WRAPPERS = dict(
    none=lambda m: m,
    parallel=nn.DataParallel,
    compiled=lambda m: torch.compile(m, backend='eager'),
    both=lambda m: torch.compile(nn.DataParallel(m), backend='eager'),
    body=lambda m: nn.Sequential(nn.DataParallel(m[0]), m[1]),
    averaged=averaged,
)
FORMS = dict(
    snapshot=snapshot,
    state_dict=lambda m: {k: t.clone() for k, t in m.state_dict().items()},
    flat=lambda m: flat_snapshot(snapshot(m)),
)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('given', WRAPPERS)
@pytest.mark.parametrize('here', WRAPPERS)
def test_names_omit_wrappers(here, given, form):
    model = trained()
    taken, before = FORMS[form](WRAPPERS[given](model)), bits(stats(model))
    wrapped = WRAPPERS[here](moved(model))
    after = bits(stats(wrapped))
    with bn_stats(wrapped, taken):
        assert same(before, stats(wrapped))
    assert same(after, stats(wrapped)) and not same(before, stats(wrapped))
    bn_restore(wrapped, taken)
    assert same(before, stats(wrapped))
    if here != 'averaged':
        bn_restore(moved(wrapped), taken, layers='0.*')
        assert same(before[:6], stats(wrapped)[:6]) and not same(before[6:], stats(wrapped)[6:])


class Named(nn.Module):
    "Its own parts have the names that wrappers use"

    def __init__(self, both=True):
        super().__init__()
        self.module = nn.Sequential(nn.BatchNorm1d(4))
        if both:
            self.add_module('0', nn.BatchNorm1d(4))

    def forward(self, x):
        return sum(m(x * i) for i, m in enumerate(self.children(), 2))


@pytest.mark.parametrize('both', [False, True])
def test_parts_that_are_named_as_wrappers_are(both):
    model, x = Named(both), torch.randn(6, 4)
    model(x)
    before = bits(stats(model))
    for given in (snapshot(model), copy.deepcopy(model.state_dict()), snapshot(nn.DataParallel(model))):
        model(x)
        bn_restore(model, given)
        assert same(before, stats(model))
    given = copy.deepcopy(nn.DataParallel(model).state_dict())
    model(x)
    bn_restore(nn.DataParallel(model), given)
    assert same(before, stats(model))
    if both:  # `module.0` is one layer in the wrapped model, and another one here
        with pytest.raises(ValueError, match='does not fit'):
            bn_restore(model, given)
    else:
        bn_restore(model, given)
    assert same(before, stats(model))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.BatchNorm1d(4)


@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel])
def test_a_layer_in_two_places(wrap):
    model, other = Tied(), Tied()
    model.a(X1)
    before, given = bits(stats(model)), copy.deepcopy(wrap(model).state_dict())
    model.a(X1)
    bn_restore(model, given)
    assert same(before, stats(model))
    bn_restore(other, {k: t for k, t in given.items() if '.b.' in f'.{k}'})  # safetensors may keep one of the names
    assert same(before, stats(other))
    with torch.no_grad():
        model.a.running_mean[0] = float('nan')
    bn_restore(other, copy.deepcopy(wrap(model).state_dict()))
    assert torch.allclose(model.a.running_mean, other.a.running_mean, equal_nan=True)
    other.b = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"no running statistics for \['(module.)?b'\]"):
        bn_restore(model, wrap(other).state_dict())


def test_files_with_several_parts():
    learn = make_learner(model=trained())
    learn.fit(1)
    whole = {'model': learn.model.state_dict(), 'opt': learn.opt.state_dict()}
    for given in (whole, {'model': whole['model']}, {'epoch': 3, 'model': whole['model']}):
        with pytest.raises(ValueError, match=r"`snapshot\['model'\]`"):
            bn_restore(learn.model, given)
    bn_restore(learn.model, whole['model'])


class WithExtra(nn.BatchNorm2d):
    def get_extra_state(self):
        return {'version': 2}

    def set_extra_state(self, state):
        pass


def test_a_state_dict_with_extra_state():
    model = nn.Sequential(WithExtra(4))
    before, given = bits(stats(model)), copy.deepcopy(model.state_dict())
    model(X2)
    bn_restore(model, given)
    assert same(before, stats(model))


def test_a_compiled_model_uses_what_was_switched_to():
    model = trained()
    taken, x = snapshot(model), torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    moved(model).eval()
    run = torch.compile(model, backend='eager')
    assert not torch.equal(run(x), y)
    with bn_stats(model, taken):
        torch.testing.assert_close(run(x), y)


def test_layers_frozen_by_construction_are_left_alone():
    model = nn.Sequential(nn.BatchNorm2d(4), FrozenBatchNorm2d(4))
    taken = snapshot(model)
    model(X2)
    model[1].running_mean += 1
    bn_restore(model, taken)
    assert not model[0].running_mean.any() and (model[1].running_mean == 1).all()


def test_modules_of_its_own_in_a_state_dict():
    "What is no norm layer of ours is not meant"
    model = trained()
    model.add_module('own', own := nn.Module())
    for k in ('running_mean', 'running_var'):
        own.register_buffer(k, torch.zeros(3))
    given = {k: t.clone() for k, t in model.state_dict().items()}
    own.running_mean += 1
    bn_restore(model, given)
    assert own.running_mean.tolist() == [1, 1, 1]


def test_held_layers_are_switched_too():
    model = trained()
    taken = snapshot(model)
    before = bits(stats(moved(model)))
    set_bn_mode(model[0], 'frozen')
    with hold_bn_mode(model, 'affine-only'), bn_stats(model, taken):
        moved(model)
        assert (bn_drift(model, taken).kl == 0).all()
    assert same(before, stats(model))


class AtBatch(Callback):
    def __init__(self, f):
        self.f = f

    def before_batch(self):
        if self.training and self.iter == 1:
            self.f()


def frozen_learner(cbs=()):
    learn = make_learner(model=trained(), cbs=[BatchNormFreeze(), *cbs])
    learn.create_opt()
    learn.freeze_to(1)
    return learn


def test_in_a_fit_what_is_fixed_has_to_be_back_before_verify_looks():
    learn = frozen_learner()
    taken = learn.bn_snapshot()
    moved(learn.model)
    with pytest.raises(RuntimeError, match='fixed by the policy.*0.1.running_mean'):
        learn.fit(1, cbs=AtBatch(lambda: learn.bn_restore(taken, layers='0.*')))

    def switch_and_back():
        with bn_stats(learn.model, taken, '0.*'):
            learn.model(learn.xb[0])

    before = bits(stats(learn.model[0]))
    learn.fit(1, cbs=AtBatch(switch_and_back))
    assert same(before, stats(learn.model[0]))


def test_of_a_learner():
    learn = make_learner(model=trained())
    assert learn.opt is None
    taken, before = learn.bn_snapshot(), bits(stats(learn.model))
    learn.fit(1)
    assert learn.bn_restore(taken) is learn and same(before, stats(learn.model))
    learn.fit(1)
    learn.bn_restore(flat_snapshot(taken), layers='0.*')
    assert same(before[:6], stats(learn.model[0])) and not same(before[6:], stats(learn.model[1]))


def test_not_while_the_frozen_part_has_to_stay():
    learn = frozen_learner()
    taken = learn.bn_snapshot()
    with learn.precompute(), pytest.raises(RuntimeError, match='`bn_restore` inside `with learn.precompute'):
        learn.bn_restore(taken)
