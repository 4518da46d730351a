"What recalibration and shift tell of layers that they cannot measure, of too few batches, and of models with tensors of other kinds"

import warnings

import pytest, torch, torch.nn.functional as F
from learners import make_learner, same
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from bnfreeze_fastai.stats.distances import bn_drift, snapshot
from bnfreeze_fastai.stats.recalibrate import recalibrate_bn
from bnfreeze_fastai.stats.shift import bn_shift

X = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(i)) * 2 + 1 for i in range(3)]


def warned(f, *args, **kwargs):
    "What `f` gives, and what it warns of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = f(*args, progress=False, **kwargs)
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return found, [message for message in told if 'None of the inputs have requires_grad' not in message]  # of checkpointing


class ByHand(nn.BatchNorm2d):
    "Normalises without PyTorch's functions"

    def forward(self, x):
        shape = 1, -1, 1, 1
        return (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + self.eps).sqrt()


class OfTheBatch(nn.BatchNorm2d):
    "Reads no statistics"

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True)


class Native(nn.BatchNorm2d):
    def forward(self, x):
        stats = self.running_mean, self.running_var, self.training, self.momentum, self.eps
        return torch.native_batch_norm(x, self.weight, self.bias, *stats)[0]


class OnACopy(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean.clone(), self.running_var, self.weight, self.bias)


class Own(nn.Module):
    "One ordinary layer, and one that `call` uses"

    def __init__(self, norm, call=lambda bn, x: bn(x)):
        super().__init__()
        self.first, self.second, self.call = nn.BatchNorm2d(3), norm, call

    def forward(self, x):
        return self.call(self.second, self.first(x))


USED = {
    'own forward': (ByHand(3), lambda bn, x: bn(x)),
    'forward called directly': (ByHand(3), lambda bn, x: bn.forward(x)),
    'forward of the class': (ByHand(3), lambda bn, x: ByHand.forward(bn, x)),
    'statistics of the batch': (OfTheBatch(3), lambda bn, x: bn(x)),
    'statistics of the batch, directly': (OfTheBatch(3), lambda bn, x: bn.forward(x)),
    'another function': (Native(3), lambda bn, x: bn(x)),
    'copied statistics': (OnACopy(3), lambda bn, x: bn(x)),
    'checkpointed': (ByHand(3), lambda bn, x: checkpoint(bn, x, use_reentrant=False)),
    'in the model': (
        nn.BatchNorm2d(3),
        lambda bn, x: torch.native_batch_norm(x, None, None, bn.running_mean, bn.running_var, False, 0.1, 1e-5)[0],
    ),
}


@pytest.mark.parametrize('method', ['batch', 'sequential'])
@pytest.mark.parametrize('case', USED)
def test_a_layer_that_is_used_but_cannot_be_measured_is_told_as_such(case, method):
    model = Own(*USED[case])
    before = snapshot(model)
    _, told = warned(recalibrate_bn, model, X, method=method)
    assert len(told) == 1 and told[0].startswith("['second'] are used, but not by `F.batch_norm`") and 'keep their statistics' in told[0]
    assert same(snapshot(model)['second'].values(), before['second'].values())
    assert bn_drift(model, before).set_index('layer').kl['first'] > 0
    shift, told = warned(bn_shift, model, X)
    assert len(told) == 1 and "['second'] are used" in told[0] and shift.kl.isna().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"nothing to measure. \['second'\] are used"):
        recalibrate_bn(model, X, layers='second', method=method, progress=False)
    assert 'forward' not in vars(model.second)


UNUSED = {
    'in training only': lambda bn, x: bn(x) if bn.training else x,
    'looked at': lambda bn, x: x.to(bn.running_mean.device, bn.running_mean.dtype),
}


@pytest.mark.parametrize('case', UNUSED)
def test_a_layer_that_is_not_called_is_told_as_such(case):
    _, told = warned(recalibrate_bn, Own(nn.BatchNorm2d(3), UNUSED[case]), X)
    assert told == [
        "No batch reached ['second']: in evaluation mode the model does not call these layers. They keep their statistics.",
    ]


def test_a_layer_that_is_given_nothing_is_told_as_such():
    _, told = warned(recalibrate_bn, Own(nn.BatchNorm2d(3), lambda bn, x: bn(x[:0])), X)
    assert told == ["For ['second'] all batches are empty. They keep their statistics."]


@pytest.mark.parametrize(
    'norm, call',
    [
        (nn.BatchNorm2d(3), lambda bn, x: bn.forward(x)),
        (nn.BatchNorm2d(3), lambda bn, x: F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)),
        (nn.BatchNorm2d(3), lambda bn, x: checkpoint(bn, x, use_reentrant=True)),
        (nn.BatchNorm2d(3), lambda bn, x: checkpoint(bn, x, use_reentrant=False)),
        (BatchNormAct2d(3), lambda bn, x: bn(x)),
    ],
)
@pytest.mark.parametrize('method', ['batch', 'sequential'])
def test_ways_to_call_that_are_measured(norm, call, method):
    model = Own(norm, call)
    _, told = warned(recalibrate_bn, model, X, method=method)
    assert not told and int(norm.num_batches_tracked) == len(X)


def test_reasons_are_told_apart():
    model = nn.Sequential(Own(ByHand(3)), Own(nn.BatchNorm2d(3), UNUSED['in training only']))
    _, told = warned(recalibrate_bn, model, X)
    assert len(told) == 2 and "['1.second']" in told[0] and "['0.second'] are used" in told[1]


class Endless(IterableDataset):
    def __iter__(self):
        return iter([x[0] for x in X])


LOADERS = {
    'list': lambda: X,
    'iterator': lambda: iter(X),
    'loader': lambda: DataLoader(torch.cat(X), 8),
    'loader without a length': lambda: DataLoader(Endless(), 1),
}


@pytest.mark.parametrize('f', [recalibrate_bn, bn_shift])
@pytest.mark.parametrize('kind', LOADERS)
def test_more_batches_than_there_are(kind, f):
    assert warned(f, nn.BatchNorm2d(3), LOADERS[kind](), n_batches=4)[1] == [
        '`n_batches` is 4, but there are only 3 batches: all of them were used.'
    ]
    for n in (1, 3, None):
        assert not warned(f, nn.BatchNorm2d(3), LOADERS[kind](), n_batches=n)[1]


def test_more_batches_than_there_are_is_told_once_for_all_passes():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert len(warned(recalibrate_bn, model, X, method='sequential', n_batches=9)[1]) == 1


def test_more_batches_than_the_learner_has():
    learn = make_learner()
    for f in (learn.recalibrate_bn, learn.bn_shift):
        with pytest.warns(UserWarning, match='`n_batches` is 10, but there are only 3 batches'):
            f(n_batches=10)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            f(n_batches=3)


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


BUFFERS = {
    'COO': lambda: torch.eye(3).to_sparse(),
    'COO, not coalesced': lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (3, 3)),
    'CSR': lambda: torch.eye(3).to_sparse_csr(),
    'CSC': lambda: torch.eye(4).to_sparse_csc(),
    'quantized': lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    'quantized by channel': lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.qint8
    ),
    'NaN': lambda: torch.tensor([float('nan'), 1.0]),
    'expanded': lambda: torch.ones(1).expand(5),
    'turned': lambda: torch.randn(3, 4).T,
    'complex, conjugated': lambda: torch.tensor([1 + 2j]).conj(),
    'eight bits': lambda: torch.ones(3).to(torch.float8_e4m3fn),
    'no elements': lambda: torch.zeros(0, 3),
    'words': lambda: torch.tensor([True, False]),
    'nested': nested,
    'MKL-DNN': lambda: torch.ones(2, 2).to_mkldnn(),
}


@pytest.mark.filterwarnings('ignore:.*(Sparse|nested|quant)')
@pytest.mark.parametrize('kind', BUFFERS)
def test_buffers_of_any_kind_elsewhere_in_the_model(kind):
    model, plain = (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    odd = BUFFERS[kind]()
    model[1].register_buffer('odd', odd)
    before = snapshot(model)
    for method in ('batch', 'sequential'):
        for m in (model, plain):
            recalibrate_bn(m, X, method=method, preserve=True, progress=False)
        assert model[1].odd is odd and bn_drift(model, before).kl.gt(0).all()
        assert all(same(s.values(), snapshot(plain)[n].values()) for n, s in snapshot(model).items())
    assert bn_shift(model, X, progress=False).kl.notna().all()
