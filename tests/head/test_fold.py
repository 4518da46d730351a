"The folded frozen part computes what the frozen part does, and leaves nothing behind"

import numpy as np, pytest, torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.torch_basics import Transform
from learners import same
from heads import small, train
from test_holds import COPIES
from test_precompute import ARCHS, conv, fingerprint_of, FunctionalDropout, generators, jitter, unet, with_model
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from bnfreeze_fastai.core import set_bn_mode
from bnfreeze_fastai.head.fold import folded
from bnfreeze_fastai.layers import bn_layers, keeps_stats
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.utils.restore import evaluating

pytestmark = pytest.mark.filterwarnings('ignore')  # deprecated torchvision arguments


def with_statistics(model, x):
    for l in bn_layers(model):
        for p in l.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
    recalibrate_bn(model, [x], progress=False)
    return model


def assert_same_output(model, x, rtol=1e-4):
    with evaluating(model):
        whole, fast = model(x), folded([model], x)(x)
    assert (whole - fast).abs().max() <= rtol * whole.abs().max()
    return folded([model], x)


@pytest.mark.parametrize('arch', ARCHS)
def test_architectures(arch):
    model, x = ARCHS[arch]()[0][0], torch.randn(4, 3, 64, 64)
    fast = assert_same_output(with_statistics(model, x), x)
    # densenet's batch norm comes before its convolutions, but for the stem and the first convolution of each block
    assert len(bn_layers(fast)) == (0 if arch != 'densenet121' else len(bn_layers(model)) - 59)
    assert next(p for p in fast.parameters() if p.ndim == 4).is_contiguous(memory_format=torch.channels_last)


class Twice(nn.Module):
    "What its convolution gives is used beside batch norm"

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return x + self.norm(x)


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


shared = conv()
MODELS = {
    'no bias': (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), 0),
    'no affine': (nn.Sequential(conv(3), nn.BatchNorm2d(4, affine=False)), 0),
    'groups, strides': (nn.Sequential(nn.Conv2d(3, 6, 3, 2, groups=3), nn.BatchNorm2d(6)), 0),
    'frozen by construction': (nn.Sequential(conv(3), FrozenBatchNorm2d(4)), 0),
    'subclass': (nn.Sequential(conv(3), Scaled(4)), 1),
    'no convolution before': (nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(4)), 1),
    'transposed': (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), 1),
    'shared convolution': (nn.Sequential(conv(3), shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4)), 2),
    'in place': (nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(), nn.BatchNorm2d(4)), 0),
    'batch statistics': (nn.Sequential(conv(3), nn.BatchNorm2d(4, track_running_stats=False)), 1),
}


@pytest.mark.parametrize('name', MODELS)
def test_what_is_folded(name):
    model, n_left = MODELS[name]
    x = torch.randn(4, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if any(map(keeps_stats, bn_layers(model))):
        with_statistics(model, x)
        before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = assert_same_output(model, x)
    assert len(bn_layers(fast)) == n_left
    assert not [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Standardised(nn.Conv2d):
    "A convolution with a forward of its own"

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)


class Named(nn.Conv2d):
    "A convolution by another name"


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def parametrized(layer):
    parametrize.register_parametrization(layer, 'weight', Doubled())
    return layer


def pruned_twice(layer):
    prune.l1_unstructured(layer, 'weight', amount=0.3)
    prune.random_structured(layer, 'weight', amount=0.5, dim=0)
    return prune.l1_unstructured(layer, 'bias', amount=0.5)


def hooked(layer):
    layer.register_forward_hook(lambda m, args, out: out.abs())
    return layer


RECOMPUTED = {
    'pruned': (lambda: prune.l1_unstructured(conv(3), 'weight', amount=0.5), 0),
    'pruned twice': (lambda: pruned_twice(conv(3)), 0),
    'weight norm, by a hook': (lambda: weight_norm(conv(3)), 0),
    'weight norm': (lambda: parametrizations.weight_norm(conv(3)), 0),
    'spectral norm, by a hook': (lambda: spectral_norm(conv(3)), 0),
    'spectral norm': (lambda: parametrizations.spectral_norm(conv(3)), 0),
    'orthogonal': (lambda: parametrizations.orthogonal(nn.Conv2d(3, 4, 1)), 0),
    'own parametrization': (lambda: parametrized(conv(3)), 0),
    'by another name': (lambda: Named(3, 4, 3), 0),
    'own forward': (lambda: Standardised(3, 4, 3), 1),
    'hook': (lambda: hooked(conv(3)), 1),
}


@pytest.mark.parametrize('name', RECOMPUTED)
def test_weights_that_are_recomputed(name):
    make, n_left = RECOMPUTED[name]
    x, model = torch.randn(4, 3, 8, 8), nn.Sequential(make(), nn.BatchNorm2d(4), nn.ReLU())
    before = {k: v.clone() for k, v in with_statistics(model, x).state_dict().items()}
    kept = vars(model[0]).copy()
    fast = assert_same_output(model, x)
    assert len(bn_layers(fast)) == n_left
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and vars(model[0]).keys() == kept.keys()


def test_a_hook_on_batch_norm_goes_on():
    x, model = torch.randn(4, 3, 8, 8), nn.Sequential(conv(3), nn.BatchNorm2d(4))
    hooked(with_statistics(model, x)[1])
    assert len(bn_layers(assert_same_output(model, x))) == 1
    set_bn_mode(model, 'frozen')  # puts a hook of ours, on another layer
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4))
    set_bn_mode(with_statistics(model, x), 'frozen')
    assert len(bn_layers(assert_same_output(model, x))) == 0


@pytest.mark.parametrize('way', ['fold_frozen', 'precompute'])
@pytest.mark.parametrize('name', ['pruned', 'weight norm, by a hook', 'weight norm', 'own parametrization', 'own forward'])
def test_trains_as_without_it_if_weights_are_recomputed(name, way):
    def make():
        torch.manual_seed(0)
        return with_model(RECOMPUTED[name][0](), nn.BatchNorm2d(4), nn.ReLU())

    plain, fast = make(), make()
    without = train(plain)
    with getattr(fast, way)():
        within = train(fast)
    np.testing.assert_allclose(within, without, rtol=1e-4)
    train(fast)


@pytest.mark.parametrize('way', ['fold_frozen', 'precompute'])
@pytest.mark.parametrize('norm', [spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_goes_on_moving(norm, way):
    with pytest.raises(ValueError, match=r"writes to a buffer.*spectral norm does: 0\.0\..*_u"):
        getattr(with_model(norm(conv(3)), nn.BatchNorm2d(4)), way)().__enter__()


def test_one_and_three_dimensions():
    for d, (conv_type, norm_type) in {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}.items():
        model, x = nn.Sequential(conv_type(3, 4, 3), norm_type(4)), torch.randn(4, 3, *[8] * d)
        assert len(bn_layers(assert_same_output(with_statistics(model, x), x))) == 0


def test_trains_as_without_it():
    plain, fast = small(), small()
    without, after = train(plain), generators()
    state = fast.model.state_dict()
    with fast.fold_frozen() as inside:
        assert inside is fast
        within = train(fast)
        assert generators() == after
        assert [*fast.model.state_dict()] == [*state] and all(fast.model.state_dict()[k] is not None for k in state)
        preds = fast.get_preds()[0]
        fast.validate()
    np.testing.assert_allclose(within, without, rtol=1e-4)
    torch.testing.assert_close(fast.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert same(plain.model[0].state_dict().values(), fast.model[0].state_dict().values())
    torch.testing.assert_close(preds, fast.get_preds()[0], rtol=1e-4, atol=1e-5)


def test_the_copy_runs_and_the_frozen_part_does_not():
    learn, ran = small(), []
    for m in learn.model[0]:
        m.register_forward_hook(lambda m, *_: ran.append(m))
    with learn.fold_frozen():
        ran.clear()
        learn.fit(1)
        originals = {id(m) for m in learn.model[0]}
        assert ran and not any(id(m) in originals for m in ran)


def test_augmentation_and_mixing_are_welcome():
    learn = small()
    learn.dls.train.after_batch.add(Transform(jitter))
    with learn.fold_frozen():
        learn.fit(1, cbs=MixUp())


@pytest.mark.parametrize('failure', [None, ZeroDivisionError, KeyboardInterrupt])
def test_all_is_given_back(failure):
    learn = small()
    learn.validate()
    before, random_numbers = fingerprint_of(learn), generators()
    if failure is None:
        with learn.fold_frozen():
            pass
    else:
        with pytest.raises(failure), learn.fold_frozen():
            raise failure
    after = fingerprint_of(learn)
    assert all(before[k] == after[k] for k in before), [k for k in before if before[k] != after[k]]
    assert generators() == random_numbers and not any(m._forward_pre_hooks for m in learn.model.modules())


@pytest.mark.parametrize(
    'make,said',
    [
        (lambda: small().freeze_to_bn(-1, bn='train'), "'0.1': 'train'"),
        (lambda: small().freeze_to_bn(0), 'Nothing is frozen'),
        (lambda: with_model(conv(3), nn.Dropout(0.1), conv()), r'0\.1 \(Dropout\)'),
        (lambda: with_model(conv(3), FunctionalDropout(), conv()), 'random in training'),
        (unet, 'DynamicUnet'),
        (lambda: with_model(conv(3), Twice()), 'more than 1e-4'),
    ],
)
def test_refused(make, said):
    learn = make()
    cbs = list(learn.cbs)
    with pytest.raises(ValueError, match=said):
        learn.fold_frozen().__enter__()
    assert learn.cbs == cbs and not any('forward' in vars(m) for m in learn.model.modules())


def test_what_would_change_the_frozen_part():
    learn = small()
    with learn.fold_frozen():
        for f in (learn.unfreeze, learn.freeze, learn.export, learn.precompute, learn.fold_frozen, learn.recalibrate_bn):
            with pytest.raises(RuntimeError, match='leave the block'):
                f()
        learn.model[0][0].weight.data.add_(1)
        for use in (lambda: learn.fit(1), learn.validate, learn.get_preds):
            with pytest.raises(RuntimeError, match='enter it again'):
                use()


@pytest.mark.parametrize('how', COPIES)
def test_a_copy_of_the_model_made_inside_runs_its_own_weights(how):
    learn = small()
    x, _ = learn.dls.valid.one_batch()
    with learn.fold_frozen():
        copied = COPIES[how](learn.model)
        assert not any(m._forward_pre_hooks for m in copied.modules()) and learn.model._forward_pre_hooks
    for model in (learn.model.eval(), copied.eval()):
        model[0][0].weight.data.mul_(-1)
    assert torch.equal(copied(x), learn.model(x))
    assert not copied[0][0].weight.requires_grad
    copied.requires_grad_(True)(x).sum().backward()
    assert copied[0][0].weight.grad.any()


def test_weights_loaded_inside_are_compared_before_the_copy_runs(tmp_path):
    learn = small()
    learn.path = tmp_path
    x, _ = learn.dls.valid.one_batch()
    for name, factor in (('other', -1), ('same', -1)):
        learn.model[0][0].weight.data.mul_(factor)
        learn.save(name)
    with learn.fold_frozen():
        learn.load('same')
        learn.model(x)
        learn.load('other')
        with pytest.raises(RuntimeError, match='other weights were loaded'):
            learn.model(x)


def test_a_loader_without_batches_is_refused():
    learn = small()
    dataset = learn.dls.train_ds
    empty = TorchDataLoader(dataset, batch_size=len(dataset) + 1, drop_last=True)
    learn.dls = DataLoaders(empty, empty)
    with pytest.raises(ValueError, match='no training batches.*drop_last'):
        learn.fold_frozen().__enter__()


def test_an_input_given_by_name_runs_through_the_frozen_part_itself():
    learn = small()
    x, _ = learn.dls.valid.one_batch()
    learn.model.eval()
    with learn.fold_frozen():
        by_name = learn.model(input=x)
    assert torch.equal(by_name, learn.model(x))
