"""Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual, rounded to the dtype of x before it is normalised."""
    total = x + residual
    return rms_norm(total, weight, eps), total
