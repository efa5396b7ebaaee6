"""Root-mean-square normalisation (Zhang and Sennrich, 2019) and layer normalisation (Ba et al., 2016), in float32.

Tensors are [..., width], weights and biases [width]; results have the dtype of x. At the least a call reads x (and the
residual) once and writes each result once: 2 · width numbers a row, 4 · width where a residual is added.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension; with `plus_one`, * (weight + 1)."""
    wide, gain = x.float(), weight.float()
    if plus_one:
        gain = gain + 1
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * gain).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) with s = x + residual, rounded to the dtype of x before it is normalised."""
    total = x + residual
    return rms_norm(total, weight, eps, plus_one=plus_one), total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    """y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * weight + bias; None is a weight of 1, a bias of 0."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    return normed.to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(layer_norm(s), s) with s = x + residual, rounded to the dtype of x before it is normalised."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
