import pytest
import torch

from kernels.fused import norm
from kernels.reference import norm as spec
from tests.kernels.closeness import assert_same

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 64), (3, 64), (17, 200), (5, 3, 24), (2, 1), (2, 1025)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(dtype, shape, device):
    x, other = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    assert_same(norm.rms_norm(x, weight, 1e-5), spec.rms_norm(x, weight, 1e-5))
    normed, total = norm.add_rms_norm(x, other, weight, 1e-5)
    expected, expected_total = spec.add_rms_norm(x, other, weight, 1e-5)
    assert_same(normed, expected)
    assert_same(total, expected_total)


def test_no_rows(device):
    x = torch.empty(0, 64, device=device)
    assert norm.rms_norm(x, torch.ones(64, device=device), 1e-5).shape == (0, 64)
