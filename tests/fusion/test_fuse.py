"Convolution and batch norm on fixed statistics as one: outputs and gradients are those of the two"

import pickle, weakref
from contextlib import nullcontext
from copy import copy, deepcopy
from functools import partial
from itertools import product

import numpy as np, pytest, timm, torch, torch.nn.functional as F
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_unet_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision import models

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn, kept_bytes
from bnfreeze_fastai.fusion.lazy import Deferred
from bnfreeze_fastai.layers import bn_layers, norm_layers

pytestmark = [
    pytest.mark.usefixtures('fused_at_any_size'),
    pytest.mark.filterwarnings('ignore'),
]  # deprecated arguments of torchvision, statistics that were never trained


def prepare(model, *inputs, mode='affine-only'):
    "Random affine parameters, the statistics of `inputs`, and `mode`"
    torch.manual_seed(0)
    for l in bn_layers(model):
        if l.affine:
            nn.init.uniform_(l.weight, 0.5, 1.5)
            nn.init.normal_(l.bias, std=0.2)
        l.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(*inputs)
    set_bn_mode(model, mode)
    return model


def tensors(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]


def loss(out):
    "Weighs all values differently"
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors(out))


def run(model, *inputs, block=None):
    "Outputs, and the gradients of inputs and parameters, by name"
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(1)
    with block or nullcontext():
        out = model(*inputs)
        loss(out).backward()
    found = {f'output {i}': t.detach() for i, t in enumerate(tensors(out))}
    found |= {f'input {i}': x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def furthest(found, exact):
    "The largest difference relative to the largest value of a tensor, over all of them"
    assert found.keys() == exact.keys()
    return max(((found[k] - t).abs().max() / t.abs().max().clamp(min=1e-12)).item() for k, t in exact.items() if t.numel())


def assert_fused(model, *inputs, norms=None):
    "With fusion all is as without; `norms` are the layers that were fused, all if not given"
    model, inputs = deepcopy(model).double(), [x.double() for x in inputs]
    exact = run(model, *inputs)
    for _ in range(2):  # the second time, with what was learned
        with fused_bn(model) as fusion:
            assert furthest(run(model, *inputs), exact) < 1e-10
            assert furthest(run(model, *inputs), exact) < 1e-10
        names = {n for n, l in norm_layers(model).items()} if norms is None else set(norms)
        assert set(fusion.pairs.batch_norm) == names


class PadsUnevenly(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, bias=self.bias, stride=self.stride[0])


class StridesOddly(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=[2], padding=(1,), dilation=2, groups=1)


class StandardisesWeight(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        return self._conv_forward(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True), self.bias)


LAYERS = {
    'conv1d': (nn.Conv1d(4, 6, 3, stride=2), (5, 4, 11)),
    'conv2d': (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    'no bias': (nn.Conv2d(4, 6, 3, bias=False), (5, 4, 7, 7)),
    'conv3d': (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), dilation=(1, 1, 2)), (3, 4, 5, 5, 6)),
    'grouped': (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 7)),
    'depthwise': (nn.Conv2d(4, 8, 3, groups=4, bias=False), (5, 4, 7, 7)),
    'same': (nn.Conv2d(4, 6, (3, 5), padding='same', dilation=2), (5, 4, 9, 9)),
    'valid': (nn.Conv2d(4, 6, 3, padding='valid'), (5, 4, 7, 7)),
    'reflect': (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (5, 4, 7, 7)),
    'transposed 1d': (nn.ConvTranspose1d(4, 6, 3), (5, 4, 7)),
    'transposed 2d': (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (5, 4, 7, 7)),
    'transposed, grouped': (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False, dilation=2), (5, 4, 7, 7)),
    'transposed 3d': (nn.ConvTranspose3d(4, 6, 2, padding=1), (3, 4, 4, 4, 4)),
    'linear': (nn.Linear(4, 6), (5, 4)),
    'linear without bias': (nn.Linear(4, 6, bias=False), (5, 4)),
    'odd arguments': (StridesOddly(4, 6, 3), (5, 4, 7, 7)),
    'uneven': (PadsUnevenly(4, 6, 3, stride=2), (5, 4, 7, 7)),
    'standardised': (StandardisesWeight(4, 6, 3), (5, 4, 7, 7)),
    'weight norm': (weight_norm(nn.Conv2d(4, 6, 3)), (5, 4, 7, 7)),
}
NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('name', LAYERS)
def test_every_kind_of_convolution(name, affine):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    model = nn.Sequential(deepcopy(layer), NORM[len(shape)](8 if name == 'depthwise' else 6, affine=affine), nn.Tanh())
    assert_fused(prepare(model, x), x, norms=['1'])


@pytest.mark.parametrize('which', list(product([True, False], repeat=4)), ids=str)
def test_gradients_go_where_the_mode_says(which):
    x = torch.randn(5, 3, 7, 7)
    model = prepare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    for p, trains in zip(list(model.parameters())[2:], which):
        p.requires_grad = trains
    weight, _, gamma, _ = which
    assert_fused(model, x, norms=['2'] if weight or not gamma else [])  # else the kernel's gradient would be for gamma alone


def test_zero_gamma_trains():
    x = torch.randn(5, 3, 7, 7)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    nn.init.zeros_(model[1].weight)
    assert_fused(model, x)
    with fused_bn(model):
        assert run(model, x)['1.weight'].abs().min() > 0


def smooth(model):
    "`model` without the kinks of its activations, where rounding turns a gradient on or off"
    for m in model.modules():
        for name, child in m.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid)):
                setattr(m, name, nn.Sigmoid() if isinstance(child, nn.Hardsigmoid) else nn.Softplus())
    return model


def unet():
    return create_unet_model(models.resnet18, 2, (64, 64), pretrained=False)


def densenet_norms(model):
    "In a DenseNet most batch norm comes before its convolution; these come after one"
    return [n for n in norm_layers(model) if n.endswith(('norm0', 'norm2'))]


def unet_norms(model):
    "In the U-Net, batch norm of what the encoder hands over comes after its activation"
    return [n for n in norm_layers(model) if n != 'layers.1' and not (n.startswith('layers') and n.endswith('.bn'))]


ARCHS = {
    'resnet50': (models.resnet50, 64, norm_layers),
    'densenet121': (models.densenet121, 64, densenet_norms),
    'mobilenet_v3_large': (models.mobilenet_v3_large, 64, norm_layers),
    'inception_v3': (partial(models.inception_v3, init_weights=False, aux_logits=False), 80, norm_layers),
    'regnet_y_400mf': (models.regnet_y_400mf, 64, norm_layers),
    'efficientnet_b0': (partial(timm.create_model, 'efficientnet_b0', drop_path_rate=0.2), 64, norm_layers),
    'resnest14d': (partial(timm.create_model, 'resnest14d'), 64, norm_layers),
    'unet': (unet, 64, unet_norms),
}


@pytest.mark.parametrize('name', ARCHS)
def test_architecture(name):
    make, size, expected = ARCHS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    model = prepare(make(), x)
    assert_fused(model, x, norms=expected(model))


@pytest.mark.parametrize('name', [n for n in ARCHS if n != 'inception_v3'])
def test_architecture_in_single_precision(name):
    make, size, _ = ARCHS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    model = make()
    plain = run(prepare(model, x), x)
    fused = run(model, x, block=fused_bn(model))
    assert furthest({'output': fused['output 0']}, {'output': plain['output 0']}) < 1e-4
    if name == 'unet':  # hooks on its activations rule out others
        return
    prepare(smooth(model), x)
    double = smooth(make())
    double.load_state_dict(model.state_dict())
    set_bn_mode(double.double(), 'affine-only')
    exact = run(double, x.double())
    assert furthest(run(model, x, block=fused_bn(model)), exact) < max(1e-4, 2 * rounding(model, x, exact))


def rounding(model, x, exact):
    "How far rounding alone takes the plain network from `exact`: as it is, with sums in another order, with the input a last bit off"
    off = [furthest(run(model, x), exact), furthest(run(deepcopy(model).to(memory_format=torch.channels_last), x), exact)]
    for seed in range(5):
        last_bit = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * torch.finfo(x.dtype).eps / 2
        off.append(furthest(run(model, x * (1 + last_bit)), exact))
    return max(off)


class Forked(nn.Module):
    "The output of the first convolution is used twice, and which way it goes depends on the data"

    def __init__(self):
        super().__init__()
        self.twice, self.sometimes, self.always = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        y = self.twice(x)
        y = self.norm1(y) + y.sigmoid()
        z = self.sometimes(y)
        z = self.norm2(z) if x.mean() > 0 else z.tanh()
        return z + self.norm3(self.always(y))


def test_used_twice_and_decided_by_data():
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64) + shift for shift in (1, 1, -1, 1)]
    model = prepare(Forked().double(), batches[0])
    exact = [run(model, x) for x in batches]
    with fused_bn(model) as fusion:
        for i, x in enumerate(batches):
            assert furthest(run(model, x), exact[i]) < 1e-10
            seen = ['norm2', 'norm3'] if i < 2 else ['norm3']
            assert fusion.pairs.batch_norm.tolist() == seen
    assert fusion.pairs.convolution.tolist() == ['always']


class Shared(nn.Module):
    "One convolution before two batch norms, and one batch norm after two convolutions"

    def __init__(self):
        super().__init__()
        self.conv, self.other, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.conv(self.norm(self.other(self.norm(self.conv(x)))).tanh()))


def test_shared_layers():
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = prepare(Shared().double(), x)
    exact = run(model, x)
    with fused_bn(model) as fusion:
        for _ in range(2):
            assert furthest(run(model, x), exact) < 1e-10
    assert sorted(map(tuple, fusion.pairs.values)) == [('conv', 'last'), ('conv', 'norm'), ('other', 'norm')]


class Between(nn.Module):
    def __init__(self, conv, norm, between):
        super().__init__()
        self.conv, self.norm, self.between = conv, norm, between

    def forward(self, x):
        return self.norm(self.between(self.conv(x)))


def doubled(y):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y * y

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy * ctx.saved_tensors[0]

    return Double.apply(y)


def into(y):
    y.mul_(2).add_(1)
    return y


def into_a_view(y):
    y.view(-1).mul_(2)
    return y


def into_data(y):
    y.data.mul_(2)
    return y


def into_numpy(y):
    y.detach().numpy()[:] *= 2
    return y


def new_data(y):
    y.data = y.data.clamp(-0.1, 0.1)
    return y


def in_inference_mode(y):
    with torch.inference_mode():
        factor = y.mean().item()
    return y * factor


@torch.no_grad()
def without_gradient(y):
    return y.mul(2).abs()


def joined(y):
    return torch.cat([y, torch.stack([y, y]).sum(0)])


LEFT = {
    'activation': nn.Sigmoid(),
    'in place': into,
    'in place, a view': into_a_view,
    'in place, data': into_data,
    'in a list': joined,
    'autograd.Function': doubled,
    'aten': torch.ops.aten.sigmoid,
    'slice': lambda y: y[:, :, 1:],
    'transposed': lambda y: y.transpose(2, 3),
    'type': lambda y: y.as_subclass(TensorImage),
    'dropout': nn.Dropout(0.5),
    'detached': lambda y: y.detach(),
    'Parameter': lambda y: nn.Parameter(y.detach()),
    'copied': lambda y: deepcopy(y.detach()),
    'detached in place': lambda y: y.detach_() + 0,
    'fixed': lambda y: y.detach().requires_grad_(),
    'copy': lambda y: copy(y.detach()) + y,
    'pickled': lambda y: pickle.loads(pickle.dumps(y.detach())) * y,
    'list': lambda y: y * len(y.tolist()),
    'foreach': lambda y: torch._foreach_mul([y], 2.0)[0],
    'foreach, in place': lambda y: (torch._foreach_mul_([y], 2.0), y)[1],
    'pointer': lambda y: y * (y.data_ptr() != 0),
    'shared': lambda y: y * y.detach().clone().share_memory_(),
    'from numpy, in place': into_numpy,
    'new data': new_data,
    'looked at in inference mode': in_inference_mode,
    'no gradient': lambda y: y + without_gradient(y),
    'from numpy': lambda y: y + torch.from_numpy(y.detach().numpy()),
    'checkpointed': lambda y: checkpoint(torch.sigmoid, y, use_reentrant=True),
}


@pytest.mark.parametrize('name', LEFT)
def test_something_between(name):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    assert_fused(prepare(Between(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LEFT[name]), x), x, norms=[])


class NumpyStride(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, np.int64(2))


NOT_CHANNELS = {
    'linear over a sequence': (nn.Linear(4, 5), nn.BatchNorm1d(5), (3, 5, 4)),
    'conv1d without a batch': (nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), (4, 7)),
    'conv2d without a batch': (nn.Conv2d(4, 5, 3), nn.BatchNorm1d(5), (4, 7, 7)),
    'instance norm': (nn.Conv2d(4, 5, 3), nn.InstanceNorm2d(5, affine=True, track_running_stats=True), (3, 4, 7, 7)),
    'group norm': (nn.Conv2d(4, 5, 3), nn.GroupNorm(1, 5), (3, 4, 7, 7)),
    'no running statistics': (nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, track_running_stats=False), (3, 4, 7, 7)),
    'stride of numpy': (NumpyStride(4, 5, 3), nn.BatchNorm2d(5), (3, 4, 7, 7)),
    'uneven padding': (nn.Conv2d(4, 5, 2, padding='same'), nn.BatchNorm2d(5), (3, 4, 7, 7)),
}


@pytest.mark.parametrize('name', NOT_CHANNELS)
def test_left_alone(name):
    conv, norm, shape = NOT_CHANNELS[name]
    x = torch.randn(shape)
    assert_fused(prepare(nn.Sequential(conv, norm), x), x, norms=[])


@pytest.mark.parametrize('mode', ['train', 'stats-only'])
def test_statistics_of_the_batch_are_never_fused(mode):
    x = torch.randn(4, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()), x, mode=mode)
    other = deepcopy(model)
    with fused_bn(model):
        for _ in range(2):
            assert furthest(run(model, x), run(other, x)) == 0
    assert all(torch.equal(b, other.state_dict()[n]) for n, b in model.state_dict().items())


def test_a_mode_switched_midway_counts_at_once():
    x = torch.randn(4, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid()), x)
    other = deepcopy(model)
    with fused_bn(model) as fusion:
        run(model, x)
        assert len(fusion.pairs) == 1
        for m in (model, other):
            set_bn_mode(m, 'train')
        assert furthest(run(model, 2 * x), run(other, 2 * x)) == 0
        assert fusion.pairs.empty
    assert torch.equal(model[1].running_var, other[1].running_var) and not torch.equal(model[1].running_mean, torch.zeros(4))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, model=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.inner = Forked() if model is None else model
        self.reentrant = reentrant

    def forward(self, x):
        y = self.first(x)
        y = checkpoint(self.norm, y, use_reentrant=self.reentrant)  # the convolution outside, batch norm inside
        return checkpoint(self.inner, y, use_reentrant=self.reentrant)


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing(reentrant):
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1
    model = prepare(Checkpointed(reentrant).double(), x)
    exact = run(model, x)
    with fused_bn(model) as fusion:
        for _ in range(3):
            assert furthest(run(model, x), exact) < 1e-10
    assert {'inner.norm3', 'inner.norm2'} <= set(fusion.pairs.batch_norm) <= {'norm', 'inner.norm2', 'inner.norm3'}


def test_the_whole_model_checkpointed():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1
    model = prepare(Forked().double(), x)
    exact = run(model, x)
    with fused_bn(model) as fusion:
        for _ in range(3):
            model.zero_grad()
            loss(checkpoint(model, x, use_reentrant=False)).backward()
            assert furthest({n: p.grad for n, p in model.named_parameters()}, {n: exact[n] for n, _ in model.named_parameters()}) < 1e-10
    assert 'norm3' in fusion.pairs.batch_norm.tolist()


@pytest.mark.parametrize('mode', ['affine-only', 'frozen'])
def test_what_is_kept_is_halved(mode):
    layer = lambda n: [nn.Conv2d(n, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    x = torch.randn(4, 3, 32, 32)
    model = prepare(nn.Sequential(*layer(3), *layer(16), *layer(16), *layer(16)), x, mode=mode)
    plain = kept_bytes(model, x)
    with fused_bn(model):
        fused = kept_bytes(model, x)
    one = 4 * 16 * 32 * 32 * 4  # bytes of one activation
    assert plain >= 8 * one and fused < 4.5 * one


def test_what_is_counted_is_not_kept_for_good():
    class Marks(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x, mark: setattr(ctx, 'mark', mark) or x.clone())
        backward = staticmethod(lambda ctx, grad: (grad, None))

    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            mark = nn.Identity()
            self.gone = weakref.ref(mark)
            return Marks.apply(self.weight * x, mark).relu()

    model = Marked()
    assert kept_bytes(model, torch.randn(2, 3)) and model.gone() is None


def test_what_autograd_does_not_need_is_not_kept():
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    model = prepare(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)), x, mode='frozen')
    model.requires_grad_(False)
    with fused_bn(model) as fusion:
        assert kept_bytes(model, x) < 1000 and model(x).requires_grad
    assert len(fusion.pairs) == 1


@pytest.mark.parametrize('channels_last', [False, True])
def test_mixed_precision(channels_last):
    torch.manual_seed(0)  # a bound on rounding by rounding, which some inputs are not kind to
    x = torch.randn(8, 3, 16, 16)
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), x)
    exact = run(deepcopy(model).double(), x.double())
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    autocast = torch.autocast('cpu', dtype=torch.bfloat16)
    plain = run(model, x, block=autocast)
    with fused_bn(model) as fusion:
        fused = run(model, x, block=autocast)
    assert len(fusion.pairs) == 2 and fused['output 0'].dtype == plain['output 0'].dtype == torch.bfloat16
    assert {n: t.dtype for n, t in fused.items()} == {n: t.dtype for n, t in plain.items()}
    assert furthest(fused, exact) < 2 * furthest(plain, exact) < 0.1


def test_the_gradient_of_beta_is_summed_in_single_precision():
    x = torch.randn(8, 3, 16, 16)
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), x)
    with fused_bn(model) as fusion, torch.autocast('cpu', dtype=torch.bfloat16):
        out = model(x)
        out.backward(dy := torch.randn_like(out) + 0.3)
    assert len(fusion.pairs) == 1 and out.dtype == torch.bfloat16
    torch.testing.assert_close(model[1].bias.grad, dy.double().sum((0, 2, 3)).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    model = prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh()), x)
    exact, model = run(deepcopy(model).double(), x.double()), model.to(dtype)
    plain = run(model, x.to(dtype))
    fused = run(model, x.to(dtype), block=fused_bn(model))
    assert furthest(fused, exact) < 2 * furthest(plain, exact) < 0.2 and fused['0.weight'].dtype == dtype


def test_can_be_differentiated_twice():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double(), x)

    def penalty():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.norm(), list(model.parameters()))

    exact = penalty()
    with fused_bn(model) as fusion:
        torch.testing.assert_close(penalty(), exact, rtol=1e-10, atol=1e-12)
    assert len(fusion.pairs) == 1


def test_two_forward_passes_before_the_backward_pass():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64) + 1
    model = prepare(Checkpointed(False).double(), x)

    def gradients():
        model.zero_grad()
        (loss(model(x)) * loss(model(-x))).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact = gradients()
    with fused_bn(model):
        for _ in range(3):
            assert furthest(gradients(), exact) < 1e-10


class Plain(torch.Tensor):
    pass


class Own(torch.Tensor):
    "Doubles what a convolution gives, and gives plain tensors for batch norm, after which convolutions may be fused"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return out * 2 if func is F.conv2d else out.as_subclass(torch.Tensor) if func is F.batch_norm else out


@pytest.mark.parametrize('kind, n', [(Plain, 0), (TensorImage, 0), (Own, 1)])
def test_types_of_tensor(kind, n):
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).as_subclass(kind)
    model = prepare(Between(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).double(), x)
    plain, exact = model(x), run(model, x)
    with fused_bn(model) as fusion:
        for _ in range(2):
            assert type(model(x)) is type(plain)
            assert furthest(run(model, x), exact) < 1e-10
    assert len(fusion.pairs) == n


def straight_through(x):
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, dy):
            return dy

    return Round.apply(x)


class Quantised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(straight_through(x), straight_through(self.weight), self.bias)


class NoConvolution(nn.Linear):
    def forward(self, x):
        return x @ (self.weight * 2).T


class HandsOn(nn.Linear):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    'layers, shape, norms',
    [
        ([Quantised(3, 4, 3), nn.BatchNorm2d(4)], (4, 3, 6, 6), ['1']),
        ([NoConvolution(3, 4), nn.BatchNorm1d(4)], (4, 3), []),
        ([HandsOn(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)], (4, 3), ['2']),
    ],
    ids=['quantised', 'no convolution', 'hands on'],
)
def test_convolutions_with_code_of_their_own(layers, shape, norms):
    x = 3 * torch.randn(shape)
    assert_fused(prepare(nn.Sequential(*layers), x), x, norms=norms)


def test_a_forward_method_of_an_instance_is_left_alone():
    x = torch.randn(4, 3, 6, 6)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    model[0].forward = own = lambda x: F.conv2d(x * 2, model[0].weight)
    plain = run(model, x)
    with fused_bn(model) as fusion:
        assert furthest(run(model, x), plain) == 0
    assert fusion.pairs.empty and model[0].forward is own


def test_no_deferred_tensor_leaves_the_model():
    x = torch.randn(4, 3, 8, 8)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), x)
    kept = []
    model[0].register_forward_hook(lambda m, args, out: kept.append(out))
    with fused_bn(model):
        out = model(x)
        assert type(out) is torch.Tensor
        plain = nn.functional.conv2d(x, model[0].weight, model[0].bias)
        with torch.no_grad():
            for p in model.parameters():
                p.data.zero_()  # as an optimizer's step, after which somebody looks at what a hook has kept
        assert torch.equal(kept[0] * 1, plain)
        run(model, x)
    assert torch.equal(kept[0] * 1, plain)


def test_hooks_of_all_kinds_see_what_they_always_saw():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def seen(fuse):
        torch.manual_seed(0)
        model, found = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double(), x), []
        conv, norm = model[:2]
        conv.register_forward_pre_hook(lambda m, args: found.append(args[0].detach().clone()))
        conv.register_forward_hook(lambda m, args, out: found.append(out.detach().clone()))
        conv.register_full_backward_hook(lambda m, dx, dy: found.extend(dy))
        norm.register_forward_pre_hook(lambda m, args: found.append(args[0].detach().clone()))
        norm.register_full_backward_hook(lambda m, dx, dy: found.extend(dx))
        norm.register_forward_hook(lambda m, args, out: 2 * out)
        with fused_bn(model) if fuse else nullcontext():
            return [run(model, x) for _ in range(2)], found

    (plain, seen_plain), (fused, seen_fused) = seen(False), seen(True)
    assert furthest(fused[0], plain[0]) < 1e-10 and furthest(fused[1], plain[1]) < 1e-10
    torch.testing.assert_close(seen_fused, seen_plain, rtol=1e-10, atol=1e-12)


def test_who_asks_autograd_about_an_output_is_answered():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    asks = {
        'tensor hook': lambda m, args, out: out.register_hook(lambda g: found.append(g)) and None,
        'node hook': lambda m, args, out: out.grad_fn.register_hook(lambda dx, dy: found.append(dy[0])) and None,
        'kept': lambda m, args, out: out.retain_grad() or outputs.append(out),
    }
    for name, ask in asks.items():
        gradients = []
        for fuse in (False, True):
            torch.manual_seed(0)
            model, found, outputs = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).double(), x), [], []
            model[0].register_forward_hook(ask)
            run(model, x, block=fused_bn(model) if fuse else None)
            gradients.append(found + [out.grad for out in outputs])
        assert len(gradients[0]) == 1
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_legacy_backward_hooks():
    x, found = torch.randn(4, 3, 8, 8), []
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh()), x)
    model[0].register_backward_hook(lambda m, dx, dy: found.append(dy[0]))
    run(model, x)
    run(model, x, block=fused_bn(model))
    assert len(found) == 2 and torch.equal(*found)


def test_gradients_with_respect_to_an_output():
    class Keeps(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), norm

        def forward(self, x):
            self.y = self.conv(x)
            return self.norm(self.y)

    x = torch.randn(4, 3, 8, 8)
    for norm, fused in ((nn.BatchNorm2d(4), True), (nn.Sigmoid(), False)):
        model = prepare(nn.Sequential(Keeps(norm), nn.BatchNorm2d(4)), x)
        (exact,) = torch.autograd.grad(loss(model(x)), model[0].y)
        with fused_bn(model):
            out = model(x)
            with pytest.raises(RuntimeError, match='fused with batch norm') if fused else nullcontext():
                (dy,) = torch.autograd.grad(loss(out), model[0].y, allow_unused=True)
    torch.testing.assert_close(dy, exact)


def test_gradients_recorded_inside_no_grad():
    class Records(nn.Conv2d):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    x = torch.randn(4, 4, 8, 8)
    model = prepare(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Records(4, 4, 3)), x)
    with torch.no_grad():
        plain = model(x)
    loss(plain).backward()
    exact = model[2].weight.grad.clone()
    model.zero_grad()
    with fused_bn(model):
        with torch.no_grad():
            out = model(x)
        loss(out).backward()
    torch.testing.assert_close(model[2].weight.grad, exact)


def test_two_passes_of_a_checkpointed_model_whose_mode_was_switched():
    x = torch.randn(4, 3, 8, 8)
    model = prepare(Checkpointed(False, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), x)

    def both():
        (loss(model(x)) * loss(model(-x))).backward()

    with fused_bn(model) as fusion:
        both()
        assert '1' in [n[-1] for n in fusion.pairs.batch_norm]
        set_bn_mode(model, 'train')
        both()
        both()
    assert fusion.pairs.empty


def test_reentrant_checkpoints_cut_between_convolution_and_norm():
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    layer = lambda n: [nn.Conv2d(n, 4, 3), nn.BatchNorm2d(4), nn.Tanh()]
    model = prepare(nn.Sequential(*layer(3), *layer(4), *layer(4)).double(), x)
    exact = run(model, x)
    for segments in (2, 3, 4, 5):
        with fused_bn(model):
            for _ in range(2):
                model.zero_grad()
                y = x.clone().requires_grad_()
                loss(checkpoint_sequential(model, segments, y, use_reentrant=True)).backward()
                found = {'input 0': y.grad} | {n: p.grad for n, p in model.named_parameters()}
                assert furthest(found, {n: exact[n] for n in found}) < 1e-10


@pytest.mark.skipif(not hasattr(checkpointing, 'CheckpointPolicy'), reason='selective checkpointing came with torch 2.5')
def test_selective_checkpointing():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    x = torch.randn(4, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).double(), x)
    exact = run(model, x)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.convolution.default else CheckpointPolicy.PREFER_RECOMPUTE

    with fused_bn(model) as fusion:
        model.zero_grad()
        loss(checkpoint(model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert furthest(found, {n: exact[n] for n in found}) < 1e-10 and len(fusion.pairs) == 2


def test_complex_numbers_are_left_alone():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 4, dtype=torch.complex64), nn.BatchNorm1d(4)

        def forward(self, x):
            z = self.linear(torch.complex(x, x.sin()))
            return self.norm(z.real + 2 * z.imag)

    x = torch.randn(5, 3)
    model = prepare(Complex(), x)
    exact = run(model, x)
    assert furthest(run(model, x, block=fused_bn(model)), exact) == 0


def test_put_into_another_tensor():
    class Stores(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            self.stored = torch.zeros(1)
            self.stored.data = y.detach()
            self.stored.data.set_(y.detach())
            return y

    x = torch.randn(4, 3, 8, 8)
    model = prepare(nn.Sequential(Stores(3, 4, 3), nn.BatchNorm2d(4)), x)
    assert_fused(model, x, norms=[])
    assert torch.equal(model[0].stored, model[0](x))


def test_the_gradient_of_an_output_that_is_fused_already():
    x = torch.randn(4, 3, 8, 8)
    model, outputs = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x), []
    model[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    with fused_bn(model):
        model(x)
        with pytest.raises(RuntimeError, match='fused with batch norm, so autograd knows nothing'):
            outputs[0].register_hook(print)


def test_an_output_of_a_part_is_computed_before_the_block_ends():
    x = torch.randn(4, 3, 8, 8)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    plain = model[0](x)
    with fused_bn(model):
        stored = model[0](x)
    model[0].weight.data.zero_()
    assert torch.equal(stored, plain)


def test_a_bias_changed_too_early_is_an_error():
    x = torch.randn(2, 3, 5, 5)
    model = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    with fused_bn(model):
        y = model[0](x)
        with torch.no_grad():
            model[0].bias.add_(1)
        for use in (model[1], torch.relu):
            with pytest.raises(RuntimeError, match='bias of a convolution was changed in place'):
                use(y)
        del y


def test_an_input_changed_too_early_is_an_error():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = x * 1
            y = self.conv(x)
            x.zero_()
            return self.norm(y)

    model = prepare(Changes(), torch.randn(2, 3, 5, 5))
    with fused_bn(model), pytest.raises(RuntimeError, match='changed in place.*without fusion'):
        model(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(1), nn.BatchNorm2d(4).double(), nn.BatchNorm2d(4)])
def test_errors_are_those_of_pytorch(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 1, 3), nn.Conv2d(1, 4, 9)).eval()
    for x in (torch.randn(2, 5, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).double(), torch.randn(2, 3, 2, 2)):
        messages = []
        for block in (nullcontext(), fused_bn(model)):
            with block, pytest.raises(RuntimeError) as e:
                model(x)
            messages.append(str(e.value))
        assert messages[0] == messages[1]


class OneMean(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean[:1], self.running_var[:1])


def test_one_value_for_all_channels_is_an_error_as_in_pytorch():
    x = torch.randn(2, 3, 8, 8)
    one_bias = nn.Conv2d(3, 4, 3)
    one_bias.bias = nn.Parameter(torch.zeros(1))
    for layers in ([nn.Conv2d(3, 4, 3), OneMean(4)], [one_bias, nn.BatchNorm2d(4)]):
        model = nn.Sequential(*layers).eval()
        for block in (nullcontext(), fused_bn(model)):
            with block, pytest.raises(RuntimeError, match='expect|elements'):
                model(x)


def test_looked_at_after_batch_norm_it_is_left_alone_from_the_next_step_on():
    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.types = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), []

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            self.types.append(type(y))
            self.mean = y.detach().mean()
            return z

    x = torch.randn(2, 3, 8, 8)
    model = prepare(Logs(), x)
    model.types.clear()
    with fused_bn(model) as fusion:
        for _ in range(3):
            run(model, x)
    assert model.types == [Deferred, torch.Tensor, torch.Tensor] and fusion.pairs.empty


@pytest.mark.parametrize('leave', [None, ZeroDivisionError, KeyboardInterrupt])
def test_nothing_is_left(leave):
    x = torch.randn(4, 3, 8, 8)
    model = prepare(Forked(), x)
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    about = lambda: [(type(m), m.training, {k: v for k, v in vars(m).items() if not k.startswith('_')}) for m in model.modules()]
    old, hooks = about(), [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    assert not any('forward' in about for _, _, about in old)
    try:
        with fused_bn(model):
            model(x)
            assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == {n: i for n, (i, _) in before.items()}
            if leave:
                raise leave
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    assert about() == old and hooks == [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
    assert all(torch.equal(t, before[n][1]) and id(t) == before[n][0] for n, t in model.state_dict(keep_vars=True).items())


@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_made_inside_fuse_nothing(copy):
    x = torch.randn(4, 3, 8, 8)
    model = prepare(Forked(), x)
    plain, inside = run(model, x), fused_bn(model)
    with inside:
        model(x)
        other = copy(model)
        assert furthest(run(other, x), plain) == 0
    assert furthest(run(other, x), plain) == 0
    with fused_bn(other) as fusion:
        run(other, x)
    assert len(fusion.pairs) == 2


def test_evaluation_is_untouched():
    x = torch.randn(4, 3, 8, 8)
    model = prepare(Forked(), x).eval()
    with torch.no_grad():
        plain = model(x)
        with fused_bn(model):
            assert torch.equal(model(x), plain)


def test_nested_blocks():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = prepare(Forked().double(), x)
    exact = run(model, x)
    with fused_bn(model), fused_bn(model):
        assert furthest(run(model, x), exact) < 1e-10
    assert not any('forward' in vars(m) for m in model.modules())


def test_a_compiled_model_is_refused():
    for model in (torch.compile(Forked()), nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))):
        with pytest.raises(ValueError, match='compiled.*without fusion'):
            fused_bn(model).__enter__()
