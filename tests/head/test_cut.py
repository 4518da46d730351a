"The cut is found where the frozen part ends, and the model goes on from there as if it had run whole"

import pytest, torch
from fastai.vision.learner import create_vision_model
from networks import ARCHS
from test_precompute import efficientnet
from torch import nn
from torchvision import models

from bnfreeze_fastai.head.cut import Cut, find_cut, is_random
from bnfreeze_fastai.head.resume import check_cut, Features, resumable
from bnfreeze_fastai.utils.restore import evaluating

pytestmark = pytest.mark.filterwarnings('ignore')  # deprecated torchvision arguments


def halves(*modules):
    return [{*nn.ModuleList(ms).parameters()} for ms in modules]


def resumed(model, cut, x):
    with evaluating(model):
        features = cut.features(x)
        with resumable(cut):
            return features, model(features.as_subclass(Features)), model(x)


@pytest.mark.parametrize('n', range(1, 7))  # a stem of two layers with parameters and four stages
def test_every_freeze_point_of_a_resnet(n):
    model, x = create_vision_model(models.resnet18, 2, pretrained=False), torch.randn(2, 3, 64, 64)
    layers = [l for l in model[0] if [*l.parameters()]]
    frozen, trained = halves(layers[:n], [*layers[n:], model[1]])
    assert len(layers) == 6
    cut = find_cut(model, x, frozen, trained)
    check_cut(model, cut, x)
    kept = [m for m in model[0] if m in cut.before]
    if n < len(layers):
        assert len(kept) == list(model[0]).index(layers[n])  # right before the first that trains
    else:
        assert cut.before == [model[0], *model[1][:2]] and resumed(model, cut, x)[0].shape == (2, 1024)
    features, within, whole = resumed(model, cut, x)
    assert torch.equal(within, whole)


def test_inside_and_after_a_timm_body():
    model, split = efficientnet()
    x, (early, late, head) = torch.randn(2, 3, 64, 64), split(model)
    after = find_cut(model, x, {*early, *late}, set(head))
    inside = find_cut(model, x, set(early), {*late, *head})
    assert after.before[0] is model[0] and list(inside.after) == [model, model[0], model[0].model.blocks]
    for cut in (after, inside):
        check_cut(model, cut, x)
        features, within, whole = resumed(model, cut, x)
        assert torch.equal(within, whole)


@pytest.mark.parametrize('name,is_chain', [('inception_v4', True), ('convnext_atto', True), ('squeezenet', False)])
def test_models_with_code_of_their_own(name, is_chain):
    model, split = ARCHS[name]()
    size = 96 if name == 'inception_v4' else 64
    x, (body, head) = torch.randn(2, 3, size, size), split(model)
    if not is_chain:
        with pytest.raises(ValueError, match=type(model).__name__):
            find_cut(model, x, set(body), set(head))
        return
    cut = find_cut(model, x, set(body), set(head))
    check_cut(model, cut, x)
    features, within, whole = resumed(model, cut, x)
    assert torch.equal(within, whole)


def test_shared_modules():
    act = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 8, 8)
    for n in (1, 3):
        cut = find_cut(model, x, *halves(model[:n], model[n:]))
        _, within, whole = resumed(model, cut, x)
        assert torch.equal(within, whole)


def test_random_layer_behind_the_frozen_part_stays_behind_the_cut():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    body = nn.Conv2d(3, 4, 3)
    for random in (nn.Dropout(0.5), Noise()):
        model = nn.Sequential(body, nn.Flatten(), random, nn.Linear(144, 2))
        cut = find_cut(model, torch.randn(2, 3, 8, 8), *halves([body], [model[3]]))
        assert cut.before == [body, model[1]]


def test_a_forward_of_its_own_is_given_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = lambda x: x
    model.forward = own
    with resumable(Cut([model[0]], {model: [model[1]]})):
        assert model.forward is not own
        assert torch.equal(model(torch.ones(2)), torch.ones(2))
        assert torch.equal(model(torch.ones(2).as_subclass(Features)), model[1](torch.ones(2)))
    assert model.forward is own


def test_a_layer_that_replaces_one_of_the_head_is_the_one_that_runs():
    "As by a conversion to `SyncBatchNorm` inside a fit, which keeps the parameters"
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2)))
    cut = Cut([model[0], model[1][0]], {model: [model[1]], model[1]: [*model[1][1:]]})
    with resumable(cut):
        model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])
        model[1][1].register_forward_hook(lambda m, xs, y: y + 1)
        features = torch.ones(2, 2)
        assert torch.equal(model.eval()(features.as_subclass(Features)), model[1][2](model[1][1](features)))


@pytest.mark.parametrize(
    'layer,random',
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0), False),
        (nn.AlphaDropout(0.1), True),
        (nn.RReLU(), True),
        (nn.LSTM(2, 2, 2, dropout=0.1), True),
        (nn.LSTM(2, 2), False),
        (nn.MultiheadAttention(2, 1, dropout=0.1), True),
        (nn.LPPool2d(2, 2), False),
        (nn.PairwiseDistance(p=2), False),
    ],
)
def test_layers_known_to_be_random(layer, random):
    assert is_random(layer) == random
