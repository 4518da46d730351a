"Losses of the same samples under several conditions, and their noise: closed forms, and fastai's own figures"

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest, torch
from fastai.callback.rnn import RNNCallback
from fastai.learner import Learner
from fastai.losses import (
    BaseLoss,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    MSELossFlat,
)
from learners import make_learner
from torch import nn
from torch.nn import functional as F

from bnfreeze_fastai.health.losses import Estimate, joined, Losses, losses_of, losses_under

G = torch.Generator().manual_seed(0)
PRED, Y = torch.randn(6, 4, generator=G), torch.tensor([0, 1, 2, 3, 0, 1])
MASKS, MASK = torch.randn(6, 4, 5, 5, generator=G), torch.randint(4, (6, 5, 5), generator=G)
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0])


def loss(func, pred, *yb):
    learn = SimpleNamespace(loss_func=func)
    learn.loss_not_reduced = partial(Learner.loss_not_reduced, learn)
    before = getattr(func, 'reduction', None)
    found = losses_of(learn, pred, yb, len(pred))
    assert learn.loss_func is func and getattr(func, 'reduction', None) == before
    return found


def own(pred, y):
    return F.cross_entropy(pred, y) + 1


PER_SAMPLE = {
    'classes': (CrossEntropyLossFlat(), PRED, Y),
    'smoothed': (LabelSmoothingCrossEntropy(), PRED, Y),
    'class weights': (nn.CrossEntropyLoss(weight=WEIGHT), PRED, Y),
    'a function': (F.cross_entropy, PRED, Y),
    'a partial': (partial(F.cross_entropy, weight=WEIGHT), PRED, Y),
    'focal': (FocalLossFlat(), PRED, Y),
    'several labels': (BCEWithLogitsLossFlat(), PRED, (PRED > 0).float()),
    'numbers': (MSELossFlat(), PRED[:, :1], PRED[:, 1]),
    'masks': (CrossEntropyLossFlat(axis=1), MASKS, MASK),
    'pixels to ignore': (CrossEntropyLossFlat(axis=1, ignore_index=0), MASKS, MASK),
    'dice': (DiceLoss(reduction='mean'), MASKS, MASK),
}


@pytest.mark.parametrize('case', PER_SAMPLE)
def test_the_mean_is_that_of_the_loss_function(case):
    func, pred, y = PER_SAMPLE[case]
    found = loss(func, pred, y)
    assert len(found.values) == len(pred) and found.sizes.tolist() == [1] * len(pred)
    assert found.mean.value == pytest.approx(float(func(pred, y)), rel=1e-5) and found.mean.se > 0


def test_each_sample_by_itself():
    found = loss(nn.CrossEntropyLoss(), PRED, Y)
    torch.testing.assert_close(found.values, F.cross_entropy(PRED.double(), Y, reduction='none'), atol=1e-6, rtol=1e-6)
    by_mask = loss(CrossEntropyLossFlat(axis=1), MASKS, MASK)
    torch.testing.assert_close(by_mask.values.float(), F.cross_entropy(MASKS, MASK, reduction='none').mean((1, 2)))


@pytest.mark.parametrize(
    'summed',
    [nn.CrossEntropyLoss(reduction='sum'), CrossEntropyLossFlat(reduction='sum'), partial(F.cross_entropy, reduction='sum')],
)
def test_a_sum_is_divided_by_the_samples(summed):
    found, plain = loss(summed, PRED, Y), loss(nn.CrossEntropyLoss(), PRED, Y)
    torch.testing.assert_close(found.values, plain.values)
    masks = loss(nn.CrossEntropyLoss(reduction='sum'), MASKS, MASK)
    torch.testing.assert_close(masks.values.float(), F.cross_entropy(MASKS, MASK, reduction='none').sum((1, 2)))


@pytest.mark.parametrize('func', [nn.CrossEntropyLoss(reduction='none'), partial(F.cross_entropy, reduction='none')])
def test_no_reduction_at_all(func):
    torch.testing.assert_close(loss(func, PRED, Y).values, loss(nn.CrossEntropyLoss(), PRED, Y).values)


class OwnLoss(nn.Module):
    "Has a `reduction` that it does not heed"

    reduction = 'mean'

    def forward(self, pred, y):
        return F.cross_entropy(pred, y)


class Total(BaseLoss):
    "Takes no other reduction"

    def __call__(self, pred, y, **kwargs):
        if self.reduction == 'none':
            raise RuntimeError('mean or sum')
        return super().__call__(pred, y, **kwargs)


@pytest.mark.parametrize('func', [own, OwnLoss(), Total(nn.CrossEntropyLoss)])
def test_samples_that_cannot_be_told_apart(func):
    found = loss(func, PRED, Y)
    assert found.sizes.tolist() == [6] and found.values.item() == pytest.approx(float(func(PRED, Y)))


def test_several_targets():
    found = loss(lambda pred, a, b, reduction='mean': F.mse_loss(pred, a + b, reduction=reduction), PRED, PRED, torch.ones(6, 4))
    assert found.values.tolist() == pytest.approx([1.0] * 6)


def test_a_loss_that_is_not_finite():
    pred = PRED.clone()
    pred[0, 0] = float('inf')
    found = loss(nn.CrossEntropyLoss(), pred, Y)
    assert len(found.values) == 6 and found.mean.value == float('inf') and found.over(found).value != found.over(found).value
    whole = loss(nn.CrossEntropyLoss(), PRED, Y)
    both = joined([found, whole])
    finite = joined([Losses(torch.ones(6).double(), torch.ones(6)), whole])
    assert both.over(finite).value == float('inf') and both.over(finite).sure


def test_means_and_errors_by_hand():
    v, w = torch.tensor([1.0, 2.0, 6.0, 3.0]).double(), torch.tensor([8, 8, 4, 2])
    even = Losses(v, torch.ones(4))
    assert even.mean == Estimate(pytest.approx(3.0), pytest.approx(float(v.std() / 2)), 3)
    mean = Losses(v, w).mean
    assert mean.value == pytest.approx((8 + 16 + 24 + 6) / 22)
    by_hand = (4 / 3 * sum(float(b * (a - mean.value)) ** 2 for a, b in zip(v, w))) ** 0.5 / 22
    assert mean.se == pytest.approx(by_hand)
    assert Losses(v * 2, w).over(Losses(v, w)).value == pytest.approx(mean.value)
    one = Losses(v[:1], w[:1]).mean
    assert one.value == 1 and one.se != one.se and not one.sure


def test_sure_is_an_interval_of_99_percent():
    # Student's t, table: 2.576 for many, 63.657 for one degree of freedom
    assert Estimate(2.6, 1.0, 10**6).sure and not Estimate(2.55, 1.0, 10**6).sure
    assert Estimate(-63.7, 1.0, 1).sure and not Estimate(63.6, 1.0, 1).sure
    assert not Estimate(5.0, float('nan'), 0).sure and not Estimate(0.0, 0.0, 9).sure
    assert Estimate(3.0, 0.3, 9) - Estimate(1.0, 0.4, 99) == Estimate(2.0, pytest.approx(0.5), 9)


def test_noise_holds_what_it_says():
    "Of 400 pairs of samples from one distribution, about one in a hundred is sure to differ"
    g = torch.Generator().manual_seed(1)
    draws = torch.randn(400, 2, 30, generator=g).double()
    wrong = sum((Losses(a, torch.ones(30)).mean - Losses(b, torch.ones(30)).mean).sure for a, b in draws)
    assert wrong < 12


def test_of_a_learner_in_evaluation():
    learn = make_learner()
    learn.fit(1)
    found = losses_under(learn, learn.dls.valid, dict(stored=nullcontext), progress=False)['stored']
    assert found.mean.value == pytest.approx(learn.validate()[0], rel=1e-5)
    assert losses_under(learn, [], dict(stored=nullcontext), progress=False) == {}


def test_batches_without_targets():
    learn = make_learner()
    for batches in ([torch.randn(4, 3, 8, 8)], [(torch.randn(4, 3, 8, 8),)]):
        with pytest.raises(ValueError, match='no targets'):
            losses_under(learn, batches, dict(stored=nullcontext), progress=False)


class Perceptual(nn.Module):
    "Compares features of a network with batch norm, which is in training mode"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, pred, y):
        return F.mse_loss(self.net(pred), self.net(y))


@pytest.mark.parametrize('how', [lambda f: f, lambda f: f.forward, lambda f: partial(f)])
@pytest.mark.parametrize('error', [False, True])
def test_a_loss_function_keeps_its_buffers(how, error):
    func, learn = Perceptual(), make_learner(model=nn.Linear(4, 4), splitter=lambda m: [*m.parameters()])
    learn.loss_func = how(func)
    before = [b.clone() for b in func.buffers()]
    batches = [(PRED, PRED + 1)] * 2 + [(PRED, PRED[:, :2])] * error
    with pytest.raises(ValueError, match='loss function raises RuntimeError.*Callbacks are off') if error else nullcontext():
        losses_under(learn, batches, dict(stored=nullcontext), progress=False)
    assert all(map(torch.equal, before, func.buffers())) and func.training


class Several(nn.Module):
    def __init__(self, nested):
        super().__init__()
        self.net, self.nested = nn.Linear(4, 4), nested

    def forward(self, x):
        pred = self.net(x)
        return ([x, pred] if self.nested else pred), [x], [x]


@pytest.mark.parametrize('nested', [False, True])
def test_a_model_for_texts_gives_more_than_its_prediction(nested):
    learn = make_learner(model=Several(nested), splitter=lambda m: [*m.parameters()])
    losses = lambda: losses_under(learn, [(PRED, Y)], dict(stored=nullcontext), progress=False)['stored']
    with pytest.raises(ValueError, match='Callbacks are off'):
        losses()
    learn.add_cb(RNNCallback())
    assert losses().mean.value == pytest.approx(F.cross_entropy(learn.model.net(PRED), Y).item())
