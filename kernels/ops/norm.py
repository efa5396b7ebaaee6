"""Root-mean-square normalisation (Zhang and Sennrich, 2019): y = x / sqrt(mean(x²) + eps) * weight.

`x` is [..., width], any strides with a contiguous last dimension; `weight` is [width]. Squares are summed in
float32. With `exact`, a row's result has the same bits however many rows there are.
"""

from torch import Tensor

from kernels.cpu import norm as cpu
from kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    """Normalise the last dimension; also the per-head q and k norms, with x as [tokens, heads, head_dim]."""
    return (cpu if x.device.type == "cpu" else reference).rms_norm(x, weight, eps, exact=exact)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype first, neither input changes."""
    return (cpu if x.device.type == "cpu" else reference).add_rms_norm(x, residual, weight, eps, exact=exact)
