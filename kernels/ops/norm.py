"""Normalisations of the last dimension, each alone and behind the addition of a residual.

`x` is [..., width], any strides with a contiguous last dimension; `weight` and `bias` are [width], contiguous. Sums are
taken in float32 and the result is rounded once, to the dtype of x. With `exact`, a row's result has the same bits
however many rows there are. Results are new and contiguous; no input changes. The fused bodies raise ValueError where
shapes, dtypes or strides do not fit.
"""

from types import ModuleType

from torch import Tensor

from kernels.cpu import norm as cpu
from kernels.ops import choice


def _body(x: Tensor) -> ModuleType:
    if not choice.is_fused(x):
        return cpu
    from kernels.fused import norm as fused

    return fused


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich, 2019); also per head, x [tokens, heads, head_dim].

    With `plus_one` the factor is weight + 1, as Gemma stores it.
    """
    return _body(x).rms_norm(x, weight, eps, plus_one=plus_one, exact=exact)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype before it is normalised."""
    return _body(x).add_rms_norm(x, residual, weight, eps, plus_one=plus_one, exact=exact)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al., 2016), the variance of the width's elements.

    None is a weight of 1 or a bias of 0.
    """
    return _body(x).layer_norm(x, weight, bias, eps, exact=exact)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual); the sum is rounded to the dtype before it is normalised."""
    return _body(x).add_layer_norm(x, residual, weight, bias, eps, exact=exact)
