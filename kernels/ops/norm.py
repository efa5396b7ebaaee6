"""Root-mean-square normalisation (Zhang and Sennrich, 2019): y = x / sqrt(mean(x²) + eps) * weight.

`x` is [..., width], any strides with a contiguous last dimension; `weight` is [width]. Squares are summed in
float32. Each row's result depends on that row alone, to the bit, so there is no exact mode to ask for.
"""

from torch import Tensor

from kernels.cpu import norm as cpu
from kernels.reference import norm as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension; also the per-head q and k norms, with x as [tokens, heads, head_dim]."""
    return (cpu if x.device.type == "cpu" else reference).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype first, neither input changes."""
    return (cpu if x.device.type == "cpu" else reference).add_rms_norm(x, residual, weight, eps)
