"`torch.func` and forward-mode differentiation inside `fused_bn`: the numbers are those of the model that is not fused"

from functools import partial

import pytest, torch, torch.autograd.forward_ad as fwAD
from torch import nn
from torch.autograd.functional import hessian as old_hessian, jacobian as old_jacobian, jvp as old_jvp, vhp
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn

pytestmark = [pytest.mark.usefixtures('fused_at_any_size'), pytest.mark.filterwarnings('ignore')]  # of PyTorch's own batching
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
X = torch.randn(5, 2, 4, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def made():
    torch.manual_seed(0)
    head = [nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)]
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), *head).double()
    model(X)
    set_bn_mode(model, 'affine-only')
    return model


def detached(model):
    return {n: p.detach() for n, p in model.named_parameters()}


def of_parameters(model, x=X):
    buffers = dict(model.named_buffers())
    return lambda params: functional_call(model, (params, buffers), (x,)).sin().sum()


def of_input(model):
    return lambda x: model(x).sin().sum()


def of_sample(model):
    return lambda params, x: of_parameters(model, x[None])(params)


def with_dual_input(model):
    with fwAD.dual_level():
        return fwAD.unpack_dual(model(fwAD.make_dual(X, X.sin()))).tangent


def with_dual_parameters(model):
    with fwAD.dual_level():
        params = {n: fwAD.make_dual(p, p.sin()) for n, p in model.named_parameters()}
        return fwAD.unpack_dual(functional_call(model, params, (X,))).tangent


def forward_over_reverse(model):
    x = X.clone().requires_grad_()
    out = model(x).sin()
    with fwAD.dual_level():
        found = torch.autograd.grad(out, x, fwAD.make_dual(torch.ones_like(out), out.detach()))
        return fwAD.unpack_dual(found[0]).tangent


def batched_gradients(model):
    x = X.clone().requires_grad_()
    out = model(x).sin()
    directions = torch.eye(out.numel(), dtype=X.dtype).view(-1, *out.shape)
    return torch.autograd.grad(out, [x, *model.parameters()], directions, is_grads_batched=True)


def gradcheck(model):
    return torch.autograd.gradcheck(model, X.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)


USES = {
    'gradients by sample': lambda m: vmap(grad(of_sample(m)), (None, 0))(detached(m), X),
    'gradients by sample of live parameters': lambda m: vmap(grad(of_sample(m)), (None, 0))(dict(m.named_parameters()), X),
    'functional_call': lambda m: functional_call(m, {n: 2 * p for n, p in m.named_parameters()}, (X,)),
    'functional_call, other statistics': lambda m: functional_call(m, {n: 2 * b for n, b in m.named_buffers()}, (X,)),
    'vmap': lambda m: vmap(m)(X[:, None]),
    'vjp': lambda m: vjp(m, X)[1](torch.ones(5, 3, dtype=X.dtype)),
    'jvp': lambda m: jvp(m, (X,), (X.sin(),)),
    'jvp of parameters': lambda m: jvp(of_parameters(m), (detached(m),), (detached(m),)),
    'linearize': lambda m: linearize(m, X)[1](X.sin()),
    'jacrev': lambda m: jacrev(of_parameters(m))(detached(m)),
    'jacfwd': lambda m: jacfwd(m)(X),
    'hessian': lambda m: hessian(of_input(m))(X),
    'hessian, both reverse': lambda m: jacrev(jacrev(of_input(m)))(X),
    'hessian, both forward': lambda m: jacfwd(jacfwd(of_input(m)))(X),
    'dual input': with_dual_input,
    'dual parameters': with_dual_parameters,
    'forward over reverse': forward_over_reverse,
    'batched gradients': batched_gradients,
    'old jacobian': lambda m: old_jacobian(m, X),
    'old jacobian, vectorised': lambda m: old_jacobian(m, X, vectorize=True),
    'old jacobian, forward': lambda m: old_jacobian(m, X, vectorize=True, strategy='forward-mode'),
    'old hessian, vectorised': lambda m: old_hessian(of_input(m), X, vectorize=True),
    'old hessian, forward': lambda m: old_hessian(of_input(m), X, vectorize=True, outer_jacobian_strategy='forward-mode'),
    'old jvp': lambda m: old_jvp(m, X, X.sin()),
    'vhp': lambda m: vhp(of_input(m), X, X.sin()),
    'gradcheck': gradcheck,
}


@pytest.mark.parametrize('name', USES)
def test_of_the_model(name):
    model = made()
    plain = USES[name](model)
    with fused_bn(model) as fusion:
        close(USES[name](model), plain)
        model(X).sum().backward()
    assert len(fusion.pairs) == 2  # what ran under a transform spoils nothing for the next step


class Transforms(nn.Module):
    "Uses the output of its convolution in `how` before or after batch norm"

    def __init__(self, how, first):
        super().__init__()
        self.conv, self.norm, self.how, self.first = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), how, first

    def forward(self, x):
        y = self.conv(x)
        if self.first:
            return self.how(y, self.norm).sin().sum() + self.norm(y).sin().sum()
        return self.norm(y).sin().sum() + self.how(y, self.norm).sin().sum()


def dual_inside(y, norm):
    with fwAD.dual_level():
        return fwAD.unpack_dual(norm(fwAD.make_dual(y, y.sin()))).tangent


INSIDE = {
    'vmap': lambda y, norm: vmap(lambda t: t.sin().sum())(y),
    'vmap of norm': lambda y, norm: vmap(lambda t: norm(t[None])[0])(y),
    'closed over': lambda y, norm: vmap(lambda k: norm(y) * k)(torch.arange(3.0, dtype=y.dtype)),
    'grad': lambda y, norm: grad(lambda t: norm(t).sin().sum())(y),
    'grad, closed over': lambda y, norm: grad(lambda w: (norm(y) * w).sum())(torch.ones_like(y)),
    'jvp': lambda y, norm: jvp(norm, (y,), (y.sin(),))[1],
    'vjp': lambda y, norm: vjp(norm, y)[1](y.sin())[0],
    'dual': dual_inside,
}


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('name', INSIDE)
def test_inside_the_model(name, first):
    torch.manual_seed(0)
    model = Transforms(INSIDE[name], first).double()
    nn.init.normal_(model.norm.running_mean)
    model.eval()

    def gradients():
        model.zero_grad()
        x = X.clone().requires_grad_()
        model(x).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    plain = gradients()
    with fused_bn(model):
        for _ in range(2):
            close(gradients(), plain)
