"Pooled moments against float64 on all values at once"

from functools import reduce

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.overrides import TorchFunctionMode

from bnfreeze_fastai.stats.moments import _rows_by_kernel, _rows_by_shift, batch_moments, instance_moments, pool


def values(batches):
    return torch.cat([b.double().transpose(0, 1).flatten(1) for b in batches], 1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    trailing=st.lists(st.integers(1, 5), max_size=3),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    scale=st.sampled_from([1.0, 1e-3, 1e3]),
    seed=st.integers(0, 99),
)
def test_uneven_batches_of_any_shape(sizes, trailing, offset, scale, seed):
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 3, *trailing, generator=g) * scale + offset + i for i, n in enumerate(sizes)]
    m, x = reduce(pool, map(batch_moments, batches)), values(batches)
    assert m.n == x.shape[1]
    torch.testing.assert_close(m.mean, x.mean(1), rtol=1e-9, atol=1e-6 * scale)
    if m.n > 1:
        torch.testing.assert_close(m.var, x.var(1), rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize('shape', [(64, 4, 32, 32), (4, 4, 200_000), (5, 4, 30_000)])
def test_a_mean_of_a_million_standard_deviations(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1e6
    m, all_values = batch_moments(x), values([x])
    torch.testing.assert_close(m.mean, all_values.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(m.var, all_values.var(1), rtol=1e-6, atol=0)


class Made(TorchFunctionMode):
    "Notes the bytes of each tensor that is made"

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if isinstance(res, torch.Tensor):
            self.bytes[res.untyped_storage().data_ptr()] = res.untyped_storage().nbytes()
        return res


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
def test_a_large_batch_is_not_copied(format):
    x = torch.randn(8, 32, 64, 64).to(memory_format=format)
    with Made() as made:
        batch_moments(x)
    assert max(n for at, n in made.bytes.items() if at != x.untyped_storage().data_ptr()) <= x.untyped_storage().nbytes() // 4


def test_order_and_grouping_do_not_matter():
    parts = [batch_moments(torch.randn(n, 2, 5) + n) for n in (1, 7, 3)]
    a, b, c = parts
    left, right = pool(pool(a, b), c), pool(c, pool(b, a))
    assert left.n == right.n and left.dof == right.dof
    torch.testing.assert_close(left.mean, right.mean)
    torch.testing.assert_close(left.var, right.var)


def test_instances_are_averaged_and_those_with_one_value_have_no_variance():
    x, one = torch.randn(4, 3, 9) * 5 + 2, torch.randn(2, 3, 1)
    m = pool(instance_moments(x), instance_moments(one))
    means = torch.cat([x.double().mean(-1), one.double()[..., 0]])
    torch.testing.assert_close(m.mean, means.mean(0))
    torch.testing.assert_close(m.var, x.double().var(-1).mean(0), rtol=1e-6, atol=0)
    assert (m.n, m.dof) == (6, 4) and instance_moments(one).dof == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_lose_nothing_more_than_their_input_has(dtype):
    x = (torch.randn(50, 3, 40) * 3 + 20).to(dtype)
    m = batch_moments(x)
    assert m.mean.dtype == torch.float64
    torch.testing.assert_close(m.mean, values([x]).mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(m.var, values([x]).var(1), rtol=1e-5, atol=0)


def test_channels_last_is_the_same():
    x = torch.randn(5, 6, 7, 8)
    a, b = batch_moments(x), batch_moments(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(a.var, b.var)
    torch.testing.assert_close(a.mean, b.mean)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_what_other_devices_use_is_the_same(dtype):
    x = (torch.randn(6, 3, 50) * 4 + 7).to(dtype)
    for a, b in zip(_rows_by_kernel(x), _rows_by_shift(x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
