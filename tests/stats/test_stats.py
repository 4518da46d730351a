"Drift, shift and re-estimation, against closed forms and float64 on the pooled data"

import pickle, random, warnings, weakref
from copy import deepcopy

import numpy as np, pandas as pd, pytest, torch
from fastai.layers import BatchNorm1dFlat
from fastai.torch_core import TensorImage, TensorMask
from learners import bits, same
from timm.layers import BatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.core import bn_mode, set_bn_mode
from bnfreeze_fastai.layers import bn_layers
from bnfreeze_fastai.stats.distances import bn_drift, snapshot
from bnfreeze_fastai.stats.observe import observe, Observer
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift


class ChannelsEnd(nn.BatchNorm1d):
    "A layer of one's own: takes (n, length, channels)"

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Twice(nn.Module):
    "One batch norm, called twice"

    def __init__(self):
        super().__init__()
        self.bn, self.lin = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.bn(self.lin(self.bn(x)))


def recal(model, batches, **kwargs):
    return recalibrate_bn(model, batches, progress=False, **kwargs)


def state(model):
    "All that a model has to have kept"
    return bits(model.state_dict().values()), [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def unchanged(before, model):
    tensors, *rest = state(model)
    return same(before[0], tensors) and rest == list(before[1:])


def conv_net():
    torch.manual_seed(0)
    conv = lambda n: [nn.Conv2d(n, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*conv(3), *conv(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
    with torch.no_grad():
        for l in bn_layers(model):
            l.weight.uniform_(0.5, 2), l.bias.normal_(), l.running_mean.normal_(), l.running_var.uniform_(0.5, 2)
    return model


def images(sizes=(8, 8, 3), px=6):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, px, px, generator=g) * (i + 1) + i for i, n in enumerate(sizes)]


def inputs_of(layers, model, batches):
    "What each layer is given, by ordinary hooks, as float64 values of shape (channels, values)"
    seen = {l: [] for l in layers}
    handles = [l.register_forward_pre_hook(lambda m, a: seen[m].append(a[0].detach().double().transpose(0, 1).flatten(1))) for l in layers]
    with torch.no_grad():
        for x in batches:
            model(x)
    for h in handles:
        h.remove()
    return {l: torch.cat(v, 1) for l, v in seen.items()}


def check_pooled(layer, x):
    torch.testing.assert_close(layer.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), x.var(1), rtol=1e-5, atol=1e-6)


LAYERS = {
    'BatchNorm1d': (nn.BatchNorm1d(4), (4,), lambda x: x.T),
    'sequence': (nn.BatchNorm1d(4), (4, 5), lambda x: x.transpose(0, 1).flatten(1)),
    'BatchNorm2d': (nn.BatchNorm2d(4), (4, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
    'BatchNorm3d': (nn.BatchNorm3d(4), (4, 5, 6, 2), lambda x: x.transpose(0, 1).flatten(1)),
    'cumulative': (nn.BatchNorm2d(4, momentum=None), (4, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
    'no affine': (nn.BatchNorm2d(4, affine=False), (4, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
    'SyncBatchNorm': (nn.SyncBatchNorm(4), (4, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
    'fastai': (BatchNorm1dFlat(4), (5, 4), lambda x: x.reshape(-1, 4).T),
    'timm': (BatchNormAct2d(4), (4, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
    "one's own": (ChannelsEnd(4), (5, 4), lambda x: x.reshape(-1, 4).T),
}


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('kind', LAYERS)
def test_every_kind_of_batch_norm_over_uneven_batches(kind, method):
    layer, shape, values = LAYERS[kind]
    layer = deepcopy(layer)
    batches = [torch.randn(n, *shape) * (i + 1) + 100 * i for i, n in enumerate((7, 1, 4))]
    recal(layer, batches, method=method)
    check_pooled(layer, values(torch.cat(batches).double()))
    assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('cls,shape', [(nn.InstanceNorm1d, (4, 9)), (nn.InstanceNorm2d, (4, 5, 6)), (nn.InstanceNorm3d, (4, 5, 6, 2))])
def test_instance_norm_averages_instances(cls, shape, method):
    layer = cls(4, track_running_stats=True)
    batches = [torch.randn(n, *shape) * (i + 1) + i for i, n in enumerate((7, 1, 4))]
    recal(layer, batches, method=method)
    x = torch.cat(batches).double().flatten(2)
    torch.testing.assert_close(layer.running_mean.double(), x.mean(-1).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), x.var(-1).mean(0), rtol=1e-5, atol=1e-6)


def test_instance_norm_normalises_each_instance_on_its_way():
    model = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4))
    recal(model, [torch.randn(8, 4, 50) * 7 + 9])
    torch.testing.assert_close(model[1].running_var, torch.ones(4), rtol=0.01, atol=0)
    torch.testing.assert_close(model[1].running_mean, torch.zeros(4), rtol=0, atol=1e-5)


def test_batch_method_sees_what_training_mode_sees():
    model, batches = conv_net(), images()
    reference = deepcopy(model)
    for m in reference.modules():
        m.training = isinstance(m, nn.modules.batchnorm._BatchNorm)
    recal(model, batches)
    for layer, x in zip(bn_layers(model), inputs_of(bn_layers(reference), reference, batches).values(), strict=True):
        check_pooled(layer, x)


@pytest.mark.parametrize('make', [conv_net, lambda: resnet18(num_classes=2)])
def test_sequential_is_exact_for_the_network_in_evaluation(make):
    torch.manual_seed(0)
    model, batches = make(), images((4, 4, 2), 32)
    recal(model, batches, method='sequential')
    for layer, x in inputs_of(bn_layers(model), model.eval(), batches).items():
        check_pooled(layer, x)
    by_batch = deepcopy(model)
    recal(by_batch, batches)
    assert not torch.allclose(bn_layers(by_batch)[-1].running_var, bn_layers(model)[-1].running_var, rtol=1e-3)


@pytest.mark.parametrize('max_mem,want', [(None, [5, 5, 5, 5, 5]), (0, [10, 7, 7, 4, 4])])
def test_sequential_runs_one_pass_or_each_up_to_its_layer_only(max_mem, want):
    "Beside a look at the first batch, and another one at it in the end where batches went in step"
    model, batches = conv_net(), images()
    calls = {i: 0 for i in range(len(model))}
    for i, m in enumerate(model):
        m.register_forward_pre_hook(lambda m, a, i=i: calls.update({i: calls[i] + 1}))
    recal(model, batches, method='sequential', max_mem=max_mem)
    assert [calls[i] for i in (0, 2, 5, 6, 10)] == want


def test_a_layer_called_twice_pools_both_calls():
    model, x = Twice(), [torch.randn(20, 4) * 3 + 1, torch.randn(5, 4)]
    for method in ('batch', 'sequential'):
        m = deepcopy(model)
        seen = inputs_of([m.bn], m.eval(), x)[m.bn]
        recal(m, x, method=method)
        assert int(m.bn.num_batches_tracked) == 2
        if method == 'sequential':
            check_pooled(m.bn, seen)


def test_a_batch_with_one_value_per_channel_uses_the_old_statistics_and_counts():
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Identity(), nn.BatchNorm1d(2, affine=False))
    model[0].running_mean.fill_(3.0)
    seen = []
    model[1].register_forward_hook(lambda m, a, out: seen.append(out))
    batches = [torch.randn(6, 2), torch.tensor([[5.0, 7.0]])]
    recal(model, batches)
    torch.testing.assert_close(seen[1], torch.tensor([[2.0, 4.0]]), rtol=1e-4, atol=0)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    check_pooled(model[0], torch.cat(batches).double().T)


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize(
    'make', [conv_net, lambda: resnet18(num_classes=2), lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True)]
)
def test_preserve_keeps_what_the_network_computes(make, method):
    torch.manual_seed(0)
    model, batches = make(), images((8, 8, 3), 32)
    for l in bn_layers(model):
        with torch.no_grad():
            l.weight.uniform_(-2, 2), l.bias.normal_()
    y, start = model.eval()(batches[1]), snapshot(model)
    drift = recal(model, batches, method=method, preserve=True)
    assert (drift.kl > 0.01).all() and all((snapshot(model)[n]['weight'] != s['weight']).all() for n, s in start.items())
    torch.testing.assert_close(model(batches[1]), y, rtol=1e-4, atol=1e-4)
    if method == 'sequential':
        for layer, x in inputs_of(bn_layers(model) if not isinstance(model, nn.InstanceNorm2d) else [], model, batches).items():
            check_pooled(layer, x)


def test_preserve_with_a_dead_channel():
    bn = nn.BatchNorm1d(2)
    bn.running_var[0] = 0
    x = [torch.randn(9, 2) * torch.tensor([1.0, 0.0]) + 4]
    y = bn.eval()(x[0])
    recal(bn, x, preserve=True)
    torch.testing.assert_close(bn(x[0]), y, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('preserve', [False, True])
@pytest.mark.parametrize('how', [dict(stats='mean'), dict(prior=6), dict(stats='mean', prior=1.5), dict(prior=0)])
def test_part_of_the_old_statistics_stays(how, preserve, method):
    model, batches = conv_net(), images()
    start, y, first = snapshot(model), model.eval()(batches[1]), inputs_of([model[1]], model, batches)[model[1]]
    recal(model, batches, method=method, preserve=preserve, **how)
    w, only_mean = how.get('prior', 0) / (how.get('prior', 0) + len(batches)), how.get('stats') == 'mean'
    seen = inputs_of(bn_layers(model), model.eval(), batches)
    for (name, old), (layer, x) in zip(start.items(), seen.items(), strict=True):
        if method == 'sequential' or layer is model[1]:
            x = first if layer is model[1] else x
            mean, var = ((1 - w) * new + w * old[k] for new, k in ((x.mean(1), 'running_mean'), (x.var(1), 'running_var')))
            torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.running_var.double(), old['running_var'] if only_mean else var, rtol=1e-5, atol=1e-6)
        assert not only_mean or torch.equal(layer.running_var.double(), old['running_var'])
    if preserve:
        torch.testing.assert_close(model(batches[1]), y, rtol=1e-4, atol=1e-4)


def test_batches_are_centred_on_their_way_where_the_variance_stays():
    x = images((8, 8))
    for norm, dims in ((nn.BatchNorm2d(3, affine=False), (0, 2, 3)), (nn.InstanceNorm2d(3, track_running_stats=True), (2, 3))):
        model = nn.Sequential(norm, nn.BatchNorm2d(3))
        norm.running_var.fill_(4.0), norm.running_mean.fill_(7.0)
        recal(model, x, stats='mean')
        want = torch.cat([(i - i.mean(dims, keepdim=True)).double() / (4 + norm.eps) ** 0.5 for i in x])
        torch.testing.assert_close(model[1].running_mean.double(), want.mean((0, 2, 3)), rtol=0, atol=1e-6)
        assert norm.running_var.tolist() == [4, 4, 4] and model[1].running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize('method', ['batch', 'sequential'])
def test_a_mean_needs_a_single_value_and_a_prior_of_nothing_heals(method):
    model = nn.BatchNorm1d(2)
    recal(model, [torch.tensor([[5.0, 7.0]])], stats='mean', method=method)
    assert model.running_mean.tolist() == [5, 7] and model.running_var.tolist() == [1, 1]
    model.running_mean.fill_(float('nan'))
    recal(model, [torch.tensor([[5.0, 7.0], [7.0, 9.0]])], prior=0, method=method)
    assert model.running_mean.tolist() == [6, 8]


@pytest.mark.parametrize('error', [None, OSError, KeyboardInterrupt])
@pytest.mark.parametrize('preserve', [False, True])
def test_in_a_with_for_its_block_only(preserve, error):
    model, plain = conv_net(), conv_net()
    before = state(model)
    want = recal(plain, images(), preserve=preserve)
    try:
        with recal(model, images(), preserve=preserve) as drift:
            assert same(bits(plain.state_dict().values()), model.state_dict().values())
            model.double()  # puts other tensors in the place of the buffers
            if error:
                raise error
    except (OSError, KeyboardInterrupt):
        assert error
    assert unchanged(before, model.float()) and drift.equals(want) and type(drift.head(1)) is type(drift[drift.kl > 0]) is pd.DataFrame
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(drift)), drift)
    with recal(model, images()), recal(model, images()[:1]):
        pass
    assert unchanged(before, model)


def test_only_what_is_chosen_changes():
    model = conv_net()
    model[3].eval(), model[5].eval()
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads):
        p.grad = g
    before, identity = state(model), [id(t) for t in model.state_dict(keep_vars=True).values()]
    drift = recal(model, images(), layers='5').set_index('layer')
    assert (drift.loc['5'] > 0).all() and (drift.loc[['1', '10']] == 0).all(axis=None)
    changed = {k for k, a, b in zip(model.state_dict(), before[0], model.state_dict().values(), strict=True) if not torch.equal(a, b)}
    assert changed == {'5.running_mean', '5.running_var', '5.num_batches_tracked'}
    assert state(model)[1:] == before[1:] and all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert [id(t) for t in model.state_dict(keep_vars=True).values()] == identity


def test_layers_that_are_not_chosen_normalise_with_stored_statistics():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = [torch.randn(30, 2) * 4]
    recal(model, x, layers='1')
    check_pooled(model[1], model[0].eval()(x[0]).detach().double().T)


class Loader:
    "Goes through `make()` anew each time"

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def fails_at(n, error):
    def batches():
        for i, x in enumerate(images()):
            if i == n:
                raise error
            yield x

    return Loader(batches)


def nan_in(n):
    return [x * float('nan') if i == n else x for i, x in enumerate(images())]


BAD = {
    'exception': (lambda: fails_at(2, OSError('disk')), {}, OSError, 'disk'),
    'ctrl-c': (lambda: fails_at(2, KeyboardInterrupt()), {}, KeyboardInterrupt, None),
    'no batches': (lambda: [], {}, ValueError, 'loader yields nothing'),
    'no batches, no length': (lambda: Loader(lambda: []), dict(progress=True), ValueError, 'loader yields nothing'),
    'nan': (lambda: nan_in(1), {}, ValueError, "Batch 2 .*'1'"),
    'infinity': (lambda: [x / 0 for x in images()], {}, ValueError, 'Batch 1'),
    'too large': (lambda: [x * 1e38 * 1e38 for x in images()], {}, ValueError, 'not finite'),
    'device': (lambda: [x.to('meta') for x in images()], {}, ValueError, 'meta.*cpu'),
    'glob': (images, dict(layers='9.*'), ValueError, r"'9\.\*'.*'1', '5', '10'"),
    'method': (images, dict(method='exact'), ValueError, "'exact'.*'batch', 'sequential'"),
    'n_batches': (images, dict(n_batches=0), ValueError, 'n_batches'),
    'one pass': (lambda: iter(images()), dict(method='sequential', max_mem=0), ValueError, 'max_mem.*DataLoader'),
    'max_mem': (images, dict(max_mem='2 GB'), ValueError, '`max_mem` is a number of bytes.*2 GB'),
    'stats': (images, dict(stats='var'), ValueError, "'var'.*'all', or 'mean'"),
    'prior': (images, dict(prior=-1), ValueError, '`prior`.*from 0 up'),
    'odd prior': (images, dict(prior=True), ValueError, '`prior`.*not True'),
    'odd method': (images, dict(method=['batch']), ValueError, "'batch', 'sequential'"),
    'empty batches': (lambda: [torch.zeros(0, 3, 6, 6)], {}, ValueError, 'all batches are empty'),
    'dict batch': (lambda: [dict(x=images()[0])], {}, ValueError, 'dict'),
    'one value': (lambda: [images((1,))[0]], dict(layers='10'), ValueError, "one value.*'10'"),
    'shape': (lambda: [images()[0], torch.randn(2, 5, 6, 6)], {}, RuntimeError, 'channels'),
}


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('case', BAD)
def test_what_fails_changes_nothing(case, method):
    make, kwargs, error, said = BAD[case]
    model, batches = conv_net(), make()
    model[1].eval()
    before, rng = state(model), torch.get_rng_state()
    with pytest.raises(error, match=said):
        recalibrate_bn(model, batches, **{'method': method, 'progress': False, **kwargs})
    assert unchanged(before, model) and torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()


class InterruptsCopy(TorchFunctionMode):
    "Raises at the n-th write into a tensor, as Ctrl-C may"

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('n', [1, 2, 5, 9])
def test_ctrl_c_while_writing_changes_nothing(n):
    model = conv_net()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), InterruptsCopy(n):
        recal(model, images(), preserve=True)
    assert unchanged(before, model)


@pytest.mark.parametrize(
    'model,said',
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), 'norm layers: none'),
        (nn.GroupNorm(1, 3), 'GroupNorm'),
        (nn.BatchNorm2d(3, track_running_stats=False), 'BatchNorm2d'),
        (nn.LazyBatchNorm2d(), 'lazy'),
    ],
)
def test_models_without_running_statistics(model, said):
    for f in (recalibrate_bn, bn_shift):
        with pytest.raises(ValueError, match=said):
            f(model, images(), progress=False)


def test_preserve_needs_weight_and_bias():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    before = state(model)
    with pytest.raises(ValueError, match=r"\['0'\]"):
        recal(model, images(), preserve=True)
    assert unchanged(before, model)
    recal(model, images(), preserve=True, layers='1')


def test_what_does_not_fit_the_type_of_the_buffers():
    model = nn.BatchNorm1d(2).half()
    before = state(model)
    with pytest.raises(ValueError, match='float16'):
        recal(model, [(torch.randn(40, 2) * 2000).half()])
    assert unchanged(before, model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('method', ['batch', 'sequential'])
def test_models_in_other_types(dtype, method):
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).to(dtype), [i.to(dtype) for i in images()]
    recal(model, x, method=method)
    want = torch.cat([i.double().transpose(0, 1).flatten(1) for i in x], 1)
    torch.testing.assert_close(model[0].running_mean, want.mean(1).to(dtype))
    torch.testing.assert_close(model[0].running_var, want.var(1).to(dtype))
    assert model[2].running_var.isfinite().all()


def test_a_layer_that_no_batch_reaches_is_kept_and_named():
    class WithAux(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return (self.main(x), self.aux(x)) if self.training else self.main(x)

    model = WithAux()
    for method in ('batch', 'sequential'):
        with pytest.warns(UserWarning, match=r"\['aux'\]"):
            recal(model, images(), method=method)
        assert int(model.main.num_batches_tracked) == 3 and int(model.aux.num_batches_tracked) == 0
    assert bn_shift(model, images(), progress=False).set_index('layer').kl.isna().to_dict() == {'main': False, 'aux': True}
    with pytest.raises(ValueError, match="aux.*in evaluation"):
        recal(model, images(), layers='aux')


def test_modes_that_are_held_stay_held():
    model = conv_net()
    set_bn_mode(model, 'frozen')
    recal(model, images())
    check_pooled(model[1], inputs_of([model[1]], model.eval(), images())[model[1]])
    before = bits(model.buffers())
    assert {bn_mode(l) for l in bn_layers(model)} == {'frozen'}
    model.train()(images()[0])
    assert same(before, model.buffers())


@pytest.mark.skipif(torch.__version__ < (2, 6), reason='without `torch.compiler.set_stance` they are refused: tests/test_compat.py')
@pytest.mark.parametrize('method', ['batch', 'sequential'])
def test_compiled_models(method):
    model, plain = conv_net(), conv_net()
    model[4:8].compile(backend='eager')
    model[0] = torch.compile(model[0], backend='eager')
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    model[9].compile(backend=backend)
    compiled.eval()(images()[0])
    n = len(compilations)
    recal(compiled, images(), method=method)
    recal(plain, images(), method=method)
    assert same(list(plain.buffers()), list(compiled.buffers())) and len(compilations) == n > 0


def test_random_numbers_are_as_before_also_those_of_a_loader():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.randn(3, 6, 6) * np.random.rand() + random.random(), i

    loader = DataLoader(Augmented(), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    states = lambda: (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        loader.generator.get_state().tolist(),
    )
    a, b = conv_net(), conv_net()
    before = states()
    recal(a, loader, method='sequential')
    assert states() == before
    recal(b, loader, method='sequential')
    assert same(list(a.buffers()), list(b.buffers())), 'the same random numbers give the same data'


def test_every_pass_sees_the_same_data():
    noisy = Loader(lambda: (torch.randn(5, 3, 6, 6) for _ in range(3)))
    model = conv_net()
    torch.manual_seed(5)
    data = list(noisy)
    torch.manual_seed(5)
    recal(model, noisy, method='sequential')
    for layer, x in inputs_of(bn_layers(model), model.eval(), data).items():
        check_pooled(layer, x)


def test_memory_is_that_of_one_batch():
    alive = []

    def batches():
        for _ in range(30):
            x = torch.randn(4, 3, 6, 6)
            alive.append(weakref.ref(x))
            assert sum(r() is not None for r in alive) <= 3
            yield x
            del x

    recalibrate_bn(conv_net(), batches())
    assert len(alive) == 30


def test_batches_may_be_tuples_and_models_may_take_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, a, b=None):
            return self.bn(a if b is None else a + b)

    a, b, y = torch.randn(9, 2), torch.randn(9, 2), torch.zeros(9)
    for batch, kwargs, want in [(a, {}, a), ((a,), {}, a), ([a, y], {}, a), ((a, b, y), {}, a + b), ((a, b, y), dict(n_inp=1), a)]:
        model = Two()
        recal(model, [batch], **kwargs)
        check_pooled(model.bn, want.double().T)


def test_empty_batches_and_tensor_subclasses_among_others():
    model = nn.BatchNorm2d(3)
    a, b = images((4, 2))
    recal(model, [TensorMask(a), torch.zeros(0, 3, 6, 6), TensorImage(b)])
    check_pooled(model, torch.cat([a, b]).double().transpose(0, 1).flatten(1))
    assert int(model.num_batches_tracked) == 3
    found, _ = observe(model, [TensorImage(a)], Observer({model.running_mean: 'bn'}), progress=False)
    assert type(found['bn'].mean) is torch.Tensor


def test_n_batches_takes_the_first_and_no_more():
    taken = []
    batches = (taken.append(i) or x for i, x in enumerate(images((4,) * 9)))
    model = nn.BatchNorm2d(3)
    recal(model, batches, n_batches=2)
    assert taken == [0, 1] and int(model.num_batches_tracked) == 2
    check_pooled(model, torch.cat(images((4,) * 9)[:2]).double().transpose(0, 1).flatten(1))


def formula(mean, var, mean0, var0):
    shift = (mean - mean0).abs() / var0.sqrt()
    ratio = (var / var0).log().abs()
    kl = lambda m, v, m0, v0: 0.5 * ((v / v0) + (m - m0) ** 2 / v0 - 1 + (v0 / v).log())
    return [t.mean().item() for t in (shift, ratio, kl(mean, var, mean0, var0) + kl(mean0, var0, mean, var))]


def test_drift_of_a_change_by_hand_is_the_formula():
    model = conv_net()
    start, bn = snapshot(model), model[5]
    old = [bn.running_mean.double().clone(), bn.running_var.double().clone()]
    bn.running_mean.mul_(-2).add_(0.3)
    bn.running_var.copy_(torch.tensor([0.1, 1.0, 5.0, 30.0]))
    drift = bn_drift(model, start).set_index('layer')
    assert drift.loc['5'].tolist() == pytest.approx(formula(bn.running_mean.double(), bn.running_var.double(), *old), rel=1e-9)
    assert (drift.loc[['1', '10']] == 0).all(axis=None) and list(drift.columns) == ['mean_shift', 'log_var_ratio', 'kl']


def test_drift_of_layers_that_cannot_be_compared():
    model = conv_net()
    start = snapshot(model)
    model[1] = nn.BatchNorm2d(7)
    model.append(nn.BatchNorm1d(4))
    drift = bn_drift(model, start).set_index('layer')
    assert drift.kl.isna().to_dict() == {'1': True, '5': False, '10': False, '11': True}
    for since in ({}, {'other': {}}, 3):
        with pytest.raises(ValueError, match='bn_snapshot'):
            bn_drift(model, since)


def test_dead_channels_do_not_drown_the_rest():
    bn = nn.BatchNorm1d(2)
    bn.running_var[0] = 1e-30
    start = snapshot(bn)
    bn.running_var[0] = 1e-20
    assert bn_drift(bn, start).kl.item() == 0
    bn.running_mean[1] += 1
    assert bn_drift(bn, start).kl.item() == pytest.approx(0.5)


def test_shift_ranks_and_changes_nothing():
    torch.manual_seed(0)
    model = conv_net()
    clean = [torch.rand(8, 3, 6, 6) for _ in range(10)]
    recal(model, clean)
    before = state(model)
    tint = torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    kl = [
        bn_shift(model, data, progress=False).kl.mean() for data in (clean, [x * tint for x in clean], [torch.randn_like(x) for x in clean])
    ]
    assert kl[0] < 1e-6 and kl[0] < kl[1] < kl[2] and unchanged(before, model)


def test_shift_is_the_drift_that_recalibration_would_bring():
    model = conv_net()
    shift = bn_shift(model, images(), progress=False)
    columns = ['mean_shift', 'log_var_ratio', 'kl']
    np.testing.assert_allclose(shift[columns], recal(model, images())[columns], rtol=1e-4)


def test_progress_bar(capsys):
    model = conv_net()
    recalibrate_bn(model, images())
    assert '100.00% [3/3' in capsys.readouterr().out
    recalibrate_bn(model, images(), method='sequential')
    out = capsys.readouterr().out
    assert out.count('100.00% [3/3') == 2 and '33.33% [1/3' in out, 'a bar of batches, then one of layers'
    recal(model, images())
    assert not capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bn_shift(model, (x for x in images()))


@pytest.mark.parametrize('length', [1, 100, None])
def test_a_wrong_length_is_for_the_bar_alone(length):
    class Iterable(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.cat(images((4, 4, 4))))

        if length:

            def __len__(self):
                return 4 * length

    model = nn.BatchNorm2d(3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns of the length
        recalibrate_bn(model, DataLoader(Iterable(), 4))
    assert int(model.num_batches_tracked) == 3


class ByDomain(nn.Module):
    "A batch norm for each domain, then one for both"

    def __init__(self):
        super().__init__()
        self.bns, self.both = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)]), nn.BatchNorm1d(4)

    def forward(self, x, domain):
        return self.both(self.bns[domain](x))


def test_sequential_where_batches_take_different_paths():
    model = ByDomain()
    batches = [(torch.randn(16, 4) * (1 + 2 * d) + 5 * d, d, 0) for d in (0, 1, 0, 1)]
    recal(model, batches, method='sequential')
    seen = []
    model.both.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for x, d, _ in batches:
        model.eval()(x, d)
    check_pooled(model.both, torch.cat(seen).double().T)


def test_deep_layers_of_a_half_precision_network():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, eps=1e-3)).half()
    with pytest.raises(ValueError, match='float16'):
        recal(model, [(torch.randn(500, 2) * 300).half()])
    shift = bn_shift(model, [(torch.randn(500, 2) * 300).half()], progress=False).set_index('layer')
    assert shift.loc['1', 'kl'] < 0.01 < shift.loc['0', 'kl']


class StaysInTraining(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


def test_layers_that_stay_in_training_mode_and_buffers_that_count():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.tensor(0))

        def forward(self, x):
            self.n.add_(1)
            return x

    model = nn.Sequential(StaysInTraining(3), Counts(), nn.BatchNorm2d(3))
    before = state(model)
    bn_shift(model, images(), progress=False)
    with pytest.raises(ValueError):
        recal(model, nan_in(2), method='sequential')
    assert unchanged(before, model)
    recal(model, images(), layers='2')
    assert same(before[0][:5], list(model.state_dict().values())[:5]) and int(model[1].n) == 0
    recal(model, images(), layers='0')
    check_pooled(model[0], torch.cat(images()).double().transpose(0, 1).flatten(1))


def test_switches_with_side_effects_are_made_in_both_directions():
    class Merges(nn.BatchNorm2d):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merges(3))
    bn_shift(model, images(), progress=False)
    assert not model[0].merged and model[0].training


def test_tensors_that_layers_share():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    model[0].weight = model[1].weight
    recal(model, images())
    for layers in ('*', '0'):
        before = state(model)
        with pytest.raises(ValueError, match=r"'0', '1'.*weight or bias" if layers == '*' else "'1'"):
            recal(model, images(), preserve=True, layers=layers)
        assert unchanged(before, model)
    model[1].weight, model[2].bias = nn.Parameter(torch.ones(3)), model[0].bias
    with pytest.raises(ValueError, match="'2'"):
        recal(model, images(), preserve=True)
    model[1].running_mean, model[1].running_var, model[2].bias = model[0].running_mean, model[0].running_var, None
    with pytest.raises(ValueError, match=r"\['1'\] share"):
        recal(model, images(), layers='0')
    recal(model, images())
    assert int(model[0].num_batches_tracked) == int(model[1].num_batches_tracked) == 3


def test_statistics_that_are_no_plain_buffers():
    model = nn.BatchNorm2d(3)
    del model.running_mean
    model.running_mean = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match='plain buffers'):
        recal(model, images())


def test_preserve_in_half_precision_loses_no_more_than_storage_does():
    torch.manual_seed(0)
    model = nn.BatchNorm1d(4).bfloat16()
    x = (torch.randn(400, 4) + 30).bfloat16()
    y = model.eval()(x)
    recal(model, [x], preserve=True)
    assert (model(x) - y).abs().max() < 0.3, 'steps of bfloat16 at 30 are 0.125'


def test_frozen_by_construction_is_left_alone():
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    drift = recal(model, images())
    assert drift.set_index('layer').kl.gt(0).to_dict() == {'0': False, '1': True}


def test_eps_counts_as_the_layer_has_it():
    bn = nn.BatchNorm1d(1, eps=0.5)
    start = snapshot(bn)
    bn.running_var.fill_(0.1)
    assert bn_drift(bn, start).log_var_ratio.item() == pytest.approx(np.log(2))
    zero = nn.BatchNorm1d(1, eps=0.0)
    zero.running_var.zero_()
    assert bn_drift(zero, snapshot(zero)).kl.item() == 0
    assert snapshot(nn.LazyBatchNorm1d())[''] == {}


def test_some_inputs_may_be_elsewhere():
    class TakesLengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, lengths):
            return self.bn(x)

    recal(TakesLengths(), [(x, [torch.zeros(2, device='meta')], 0) for x in images()])
    with pytest.raises(ValueError, match='meta'):
        recal(TakesLengths(), [(dict(x=x.to('meta')), 0, 0) for x in images()])


def test_ctrl_c_in_a_held_layer():
    model = conv_net()
    set_bn_mode(model, 'frozen')
    model.train()
    handle = model[5].register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        recal(model, images())
    handle.remove()
    set_bn_mode(model, 'train')
    assert all(l.training for l in bn_layers(model))
