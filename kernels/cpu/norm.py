"""Normalisation by torch's own kernels.

In `F.rms_norm` and `F.layer_norm` the sum over a row does not depend on the number of rows
(tests/kernels/test_exactness.py), and what follows it is single correctly rounded operations, so they are exact.
`F.rms_norm` runs a dozen small operations, though: bfloat16 rows go to one compiled pass instead, exact as well, since
it treats every row alike.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import choice
from kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False) -> Tensor:
    if plus_one:  # a sum in bfloat16 would lose what small weights say
        return reference.rms_norm(x, weight, eps, plus_one=True, exact=exact)
    if choice.is_compiled(x) and x.ndim == 2 and x.is_contiguous():
        from kernels.cpu.compiled import norm as compiled

        return compiled.rms_norm(x, weight, eps)
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
