"""Normalisation by torch's own kernels.

In `F.rms_norm` and `F.layer_norm` the sum over a row does not depend on the number of rows
(tests/kernels/test_exactness.py), and what follows it is single correctly rounded operations, so they are exact.
`F.rms_norm` runs a dozen small operations, though: for the single row of a lone stream three do (7 µs against 13,
thirty-odd times a step).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False) -> Tensor:
    if plus_one:  # a sum in bfloat16 would lose what small weights say
        return reference.rms_norm(x, weight, eps, plus_one=True, exact=exact)
    if not exact and x.ndim == 2 and x.shape[0] == 1:
        norm = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        return x.mul((norm * norm / x.shape[1] + eps) ** -0.5).mul_(weight)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps, plus_one=plus_one, exact=exact), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return layer_norm(total, weight, bias, eps, exact=exact), total
