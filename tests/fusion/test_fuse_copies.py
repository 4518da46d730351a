"Copies of a model made while it is fused are models of plain PyTorch"

import copy, io, subprocess, sys

import pytest, torch
from fastai.callback.core import Callback
from learners import body_and_head, make_learner
from test_fuse import Forked, furthest, prepare, run
from test_holds import COPIES, parametrized
from torch import nn

from bnfreeze_fastai.core import hold_bn_mode, set_bn_mode
from bnfreeze_fastai.fusion.fuse import fused_bn
from bnfreeze_fastai.layers import bn_layers

pytestmark = [pytest.mark.usefixtures('fused_at_any_size'), pytest.mark.filterwarnings('ignore')]  # statistics that were never trained
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ours_on(model):
    "What the modules of `model` have of their own that is none of PyTorch's: attributes and hooks"
    own = {k for m in model.modules() for k in vars(m)} & {'forward', '__reduce_ex__', '__deepcopy__'}
    return own | {type(h) for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())}


@pytest.mark.parametrize('how', [*COPIES, 'copy'])
@pytest.mark.parametrize('nested', [False, True])
def test_carry_nothing(how, nested):
    model = prepare(Forked(), X)
    set_bn_mode(model, 'train')
    model.eval()
    plain = run(model, X)
    copied = {**COPIES, 'copy': copy.copy}[how]
    with fused_bn(model), fused_bn(model) if nested else fused_bn(nn.Identity()):
        run(model, X)
        found = copied(model)
        convolution = copied(model.twice)
        assert not ours_on(convolution) and (how == 'copy' or not ours_on(found))
        assert 'forward' in vars(model.twice)
        if how != 'copy':  # a shallow one has the same convolutions
            assert furthest(run(found, X), plain) == 0
    assert not ours_on(model) and not ours_on(found)
    with fused_bn(found) as fusion:
        assert furthest(run(found, X), plain) < 1e-4
    assert len(fusion.pairs) == 2


def test_a_root_that_is_a_convolution_or_a_norm():
    for model in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)):
        with fused_bn(model), fused_bn(nn.Sequential(model, nn.BatchNorm2d(3))):
            assert not ours_on(copy.deepcopy(model))
        assert not ours_on(model)


def test_parametrized_convolutions():
    model = parametrized()
    nn.utils.parametrizations.weight_norm(model[0][0])
    prepare(model, X, mode='train').eval()
    with fused_bn(model):
        run(model, X)
        copied = copy.deepcopy(model)
    assert not ours_on(copied) and not ours_on(model)
    assert furthest(run(copied, X), run(model, X)) == 0


def test_a_held_and_fused_layer_has_neither_in_a_copy():
    model = prepare(body_and_head(), X, mode='train')
    with hold_bn_mode(model, 'affine-only'), fused_bn(model):
        run(model, X)
        copied = copy.deepcopy(model)
    assert not ours_on(copied) and all('_bn_holds' not in vars(l) for l in bn_layers(copied))
    tracked = copied[0][1].num_batches_tracked.item()
    copied.train()(X)
    assert copied[0][1].num_batches_tracked == tracked + 1


def test_what_others_put_on_stays():
    model = prepare(Forked(), X)
    calls = []
    model.register_forward_hook(lambda *_: calls.append('root'))
    model.twice.register_forward_hook(lambda *_: calls.append("twice"))
    with fused_bn(model):
        copied = copy.deepcopy(model)
    copied(X)
    assert sorted(calls) == ["root", "twice"]


STORES = """
from torch import nn


class Stores(nn.Module):
    "Keeps the output of its convolution"

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        self.stored = self.conv(x)
        return self.norm(self.stored)
"""

LOADS = """
import pickle, sys, torch
sys.modules['bnfreeze_fastai'] = None
{classes}
for f in sys.argv[1:]:
    model = torch.load(f, weights_only=False)
    out = model(torch.randn(2, 3, 8, 8))
    assert type(out) is torch.Tensor and not any('forward' in vars(m) for m in model.modules())
    out.sum().backward()
"""


@pytest.mark.parametrize('kind', ['sequential', 'one that stores what it computed'])
def test_load_without_this_package(kind, tmp_path):
    plain = kind == 'sequential'
    if not plain:
        exec(STORES, vars(sys.modules['__main__']))  # as in the other process
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) if plain else sys.modules['__main__'].Stores()
    prepare(model, X, mode='train')
    model.eval()
    with fused_bn(model):
        model(X)
        torch.save(model, tmp_path / 'a.pth')
        if plain:
            torch.save(copy.deepcopy(model), tmp_path / 'b.pth')
    files = [p.name for p in tmp_path.glob('*.pth')]
    subprocess.run([sys.executable, '-c', LOADS.format(classes=STORES), *files], cwd=tmp_path, check=True)


def test_a_copy_can_be_scripted_traced_and_exported():
    model = prepare(body_and_head(), X, mode='train').eval()
    out = model(X)
    with fused_bn(model):
        run(model, X)
        copied = copy.deepcopy(model)
        scripted = torch.jit.script(copied)
        exported = torch.export.export(copied, (X,)).module()
        traced = torch.jit.trace(copied, X)
    torch.jit.save(scripted, f := io.BytesIO())
    loaded = torch.jit.load(io.BytesIO(f.getvalue()))
    for m in (scripted, exported, traced, loaded):
        torch.testing.assert_close(m(X), out)


def test_made_in_a_fit_load_without_this_package(tmp_path):
    class Saves(Callback):
        order, run_valid = 100, False

        def after_pred(self):
            torch.save(self.model, tmp_path / 'in_pass.pth')

        def after_batch(self):
            torch.save(self.model, tmp_path / 'after_batch.pth')
            torch.save(copy.deepcopy(self.model), tmp_path / 'copy.pth')

    learn = make_learner()
    learn.fit(1)
    learn.freeze_to_bn(0, bn_above='affine-only').fuse_bn()
    learn.fit(1, cbs=Saves())
    assert len(learn.batch_norm_fuse.pairs) == 2
    files = ['in_pass.pth', 'after_batch.pth', 'copy.pth']
    subprocess.run([sys.executable, '-c', LOADS.format(classes=''), *files], cwd=tmp_path, check=True)
    assert not ours_on(learn.model)
