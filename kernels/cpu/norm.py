"""Root-mean-square normalisation by torch's own kernels.

In `F.rms_norm` the sum over a row does not depend on the number of rows (tests/kernels/test_exactness.py), and what
follows it is single correctly rounded operations, so it is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LONG_ROWS = 64


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    if not exact and x.dtype == torch.bfloat16 and x.ndim == 2 and x.shape[0] >= LONG_ROWS:
        return _rms_norm_long(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, exact=exact), total


def _rms_norm_long(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One pass for the norm instead of a widened copy: 265 against 500 µs at 512 × 1024."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(x.dtype)
