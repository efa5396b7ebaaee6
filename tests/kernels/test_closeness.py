"""The comparison used by all kernel tests rejects what it must."""

import pytest
import torch

from tests.kernels.closeness import assert_same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_rounded_once_more_is_accepted(dtype):
    exact = torch.randn(33, 64, dtype=torch.float64)
    assert_same((exact * (1 + 1e-8)).to(dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil",
    [torch.zeros_like, lambda x: x.flip(0), lambda x: x.roll(1, -1), lambda x: x * 1.01, lambda x: x * float("nan")],
    ids=["zeros", "rows permuted", "columns shifted", "one percent", "nan"],
)
def test_a_wrong_result_is_rejected(dtype, spoil):
    expected = torch.randn(33, 64).to(dtype)
    with pytest.raises(AssertionError):
        assert_same(spoil(expected), expected)
