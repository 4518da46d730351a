"Fused or not, transforms of functions give the same: `torch.func`, forward-mode differentiation, tracing"

import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn

pytestmark = [pytest.mark.usefixtures('fused_at_any_size'), pytest.mark.filterwarnings('ignore')]  # deprecated parts of tracing


@pytest.fixture
def net():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    net(3 * torch.randn(16, 3, 8, 8).double() + 1)
    set_bn_mode(net, 'affine-only')
    return net


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 1, 0])


def weights(net):
    return {n: p.detach() for n, p in net.named_parameters()}


def loss_of(net):
    return lambda w, x, y: F.cross_entropy(functional_call(net, w, (x[None],)), y[None])


def ones(tensors):
    return torch.utils._pytree.tree_map(torch.ones_like, tensors)


def dual(net, w, x):
    "Output and tangent of a pass of dual numbers"
    with forward_ad.dual_level():
        w = {n: forward_ad.make_dual(t, torch.ones_like(t)) for n, t in w.items()}
        return tuple(forward_ad.unpack_dual(functional_call(net, w, (forward_ad.make_dual(x, torch.ones_like(x)),))))


def gradient_of_tangent(net):
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        return torch.autograd.grad(tangent.square().sum(), [x, net[0].weight])


TRANSFORMS = dict(
    per_sample_gradients=lambda net: vmap(grad(loss_of(net)), (None, 0, 0))(weights(net), X, Y),
    gradient=lambda net: grad(lambda w: functional_call(net, w, (X,)).square().sum())(weights(net)),
    forward_mode=lambda net: jvp(net, (X,), (torch.ones_like(X),)),
    forward_mode_of_weights=lambda net: jvp(lambda w: functional_call(net, w, (X,)), (weights(net),), (ones(weights(net)),)),
    vjp=lambda net: vjp(lambda w: functional_call(net, w, (X,)), weights(net))[1](torch.ones(4, 2).double()),
    jacrev=lambda net: jacrev(lambda w: functional_call(net, w, (X,)))(weights(net)),
    jacfwd=lambda net: jacfwd(net)(X[:1]),
    hessian_of_gamma=lambda net: hessian(lambda g: functional_call(net, {'1.weight': g}, (X,)).square().sum())(net[1].weight.detach()),
    linearize=lambda net: linearize(net, X)[1](torch.ones_like(X)),
    ensemble=lambda net: vmap(lambda w, b: functional_call(net, (w, b), (X,)))(*stack_module_state([net, net])),
    by_sample=lambda net: torch.autograd.grad(vmap(net)(X[:, None]).square().sum(), [*net.parameters()]),
    dual_numbers=lambda net: dual(net, weights(net), X),
    dual_numbers_with_gradients=lambda net: dual(net, dict(net.named_parameters()), X),
    gradient_of_tangent=gradient_of_tangent,
    double_backward_trick=lambda net: functional.hvp(lambda x: net(x).square().sum(), X, ones(X)),
    vectorized_forward_mode=lambda net: functional.jacobian(net, X[:1], vectorize=True, strategy='forward-mode'),
    traced=lambda net: torch.jit.trace(net, X)(X),
)


def tensors(found):
    return [t.detach() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def assert_same_when_fused(net, f):
    plain = tensors(f(net))
    with fused_bn(net):
        fused = tensors(f(net))
    assert plain
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_transforms_of_a_fused_model_give_what_they_give_without(net, name):
    assert_same_when_fused(net, TRANSFORMS[name])


def between(transform):
    "Only what follows the convolution is transformed"

    def run(net):
        x = X.clone().requires_grad_()
        out = transform(net[1], net[0](x))
        return out, torch.autograd.grad(sum(t.square().sum() for t in tensors_with_graph(out)), [x, net[0].weight])

    return run


def tensors_with_graph(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if t.requires_grad]


def dual_norm(norm, h):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(norm(forward_ad.make_dual(h, torch.ones(h.shape).to(h.dtype)))))


@pytest.mark.parametrize(
    'transform',
    [
        lambda norm, h: vmap(lambda t: norm(t[None]))(h),
        lambda norm, h: vmap(lambda t: norm(h) * t)(torch.ones(2).double()),
        lambda norm, h: jvp(norm, (h,), (torch.ones_like(h),)),
        lambda norm, h: grad(lambda t: norm(t).square().sum())(h),
        dual_norm,
    ],
)
def test_a_transform_may_begin_between_convolution_and_batch_norm(net, transform):
    assert_same_when_fused(net, between(transform))


def test_what_comes_after_a_transform_is_fused_as_before(net):
    with fused_bn(net) as fusion:
        TRANSFORMS['per_sample_gradients'](net)
        assert fusion.pairs.empty
        net(X).sum().backward()
        assert fusion.pairs.batch_norm.tolist() == ['1', '4']
