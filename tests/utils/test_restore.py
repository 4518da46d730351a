"Buffers of every sort are compared and given back"

import pytest, torch
from heads import small, train
from torch import nn

from bnfreeze_fastai.choose.trials import trial_copy
from bnfreeze_fastai.utils.restore import evaluating
from bnfreeze_fastai.utils.tensors import fingerprint, plain_parts


def quantized(by_channel=False):
    if by_channel:
        return torch.quantize_per_channel(torch.arange(6.0).view(2, 3), torch.tensor([0.5, 1.0]), torch.tensor([0, 1]), 0, torch.qint8)
    return torch.quantize_per_tensor(torch.arange(6.0).view(2, 3), 0.5, 1, torch.qint8)


MATRIX = torch.tensor([[1.0, 0], [0, 2]])
BUFFERS = {
    'sparse': MATRIX.to_sparse(),
    'uncoalesced': torch.sparse_coo_tensor(torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), (2, 2)),
    'hybrid': torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 3), (2, 3)),
    'csr': MATRIX.to_sparse_csr(),
    'csc': MATRIX.to_sparse_csc(),
    'bsr': MATRIX.to_sparse_bsr((1, 1)),
    'mkldnn': MATRIX.to_mkldnn(),
    'quantized': quantized(),
    'quantized by channel': quantized(True),
    'nested': torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    'jagged': torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    'meta': torch.empty(2, device='meta'),
    'complex': torch.ones(2, dtype=torch.complex64),
    'conjugate': torch.tensor([1 + 2j, 3]).conj(),
    'negative': torch.tensor([1 + 2j, 3]).conj().imag,
    'transposed': torch.arange(6.0).view(2, 3).T,
    'expanded': torch.ones(1).expand(3),
    'steps': torch.arange(6)[::2],
    'no elements': torch.empty(0, 3),
    'no dimension': torch.tensor(1.0),
    'bool': torch.tensor([True, False]),
    'half': torch.ones(2, dtype=torch.bfloat16),
    'eighth': torch.ones(2).to(torch.float8_e4m3fn),
    'nan': torch.tensor([torch.nan, 1]),
    'channels last': torch.rand(1, 2, 3, 3).contiguous(memory_format=torch.channels_last),
    'four dimensions, sparse': torch.eye(4).view(1, 1, 4, 4).to_sparse(),
}


@pytest.mark.filterwarnings('ignore')  # sparse CSR and nested tensors are in beta
@pytest.mark.parametrize('name', BUFFERS)
def test_buffers_are_hashed_and_given_back(name):
    b = BUFFERS[name]
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer('other', b)
    before = fingerprint(b)
    assert before == fingerprint(b.clone()) and len(before) == 16
    with evaluating(model):
        model(torch.ones(2, 2))
    assert model.other is b and fingerprint(b) == before


CHANGES = {
    'sparse': lambda b: b.mul_(2),
    'hybrid': lambda b: b.mul_(2),
    'csr': lambda b: b.values().mul_(2),
    'quantized': lambda b: b.copy_(torch.zeros(2, 3)),
    'quantized by channel': lambda b: b.copy_(torch.zeros(2, 3)),
    'complex': lambda b: b.imag.add_(1),
    'transposed': lambda b: b.add_(1),
    'steps': lambda b: b.add_(1),
    'half': lambda b: b.add_(1),
    'bool': lambda b: b.logical_not_(),
    'nan': lambda b: b.zero_(),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CHANGES)
def test_what_was_written_is_undone(name):
    model, b = nn.Sequential(nn.BatchNorm1d(2)), BUFFERS[name].clone()
    model.register_buffer('other', b)
    before = fingerprint(b)
    with evaluating(model):
        CHANGES[name](b)
        assert fingerprint(b) != before
    assert model.other is b and fingerprint(b) == before


def test_a_buffer_put_in_place_of_another():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('n', torch.zeros(()))

        def forward(self, x):
            self.n = self.n + 1
            return x

    model = Counts()
    n = model.n
    with evaluating(model):
        model(1)
    assert model.n is n and n == 0


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [n for n in BUFFERS if n not in ('meta', 'mkldnn', 'nested', 'jagged')])  # what copying and `to` take
@pytest.mark.parametrize('way', ['precompute', 'fold_frozen', 'recalibrate_bn', 'bn_shift'])
def test_tools_take_a_model_with_such_a_buffer(name, way):
    def make():
        learn = small()
        learn.model[0].register_buffer('other', BUFFERS[name].clone(), persistent=False)
        return learn

    plain, learn = make(), make()
    if way in ('recalibrate_bn', 'bn_shift'):
        getattr(learn, way)()
    else:
        without = train(plain)
        with getattr(learn, way)():
            torch.testing.assert_close(train(learn), without, rtol=1e-4, atol=1e-5)
    assert fingerprint(learn.model[0].other) == fingerprint(BUFFERS[name].clone())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['sparse', 'csr', 'quantized', 'transposed', 'no elements', 'complex'])
def test_a_trial_copies_such_a_buffer(name, tmp_path):
    learn = small()
    learn.model[0].register_buffer('other', BUFFERS[name].clone(), persistent=False)
    copied = trial_copy(learn, tmp_path).model[0].other
    assert copied is not learn.model[0].other and fingerprint(copied) == fingerprint(BUFFERS[name].clone())


def test_parts_of_a_tensor():
    assert [len(plain_parts(BUFFERS[n])) for n in ('sparse', 'csr', 'quantized', 'meta', 'bool')] == [2, 3, 3, 0, 1]
