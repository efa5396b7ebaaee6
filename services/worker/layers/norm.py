"""Normalisation layers."""

from typing import Protocol

import torch
from torch import Tensor

from kernels.ops.norm import layer_norm, rms_norm


class Norm(Protocol):
    def __call__(self, x: Tensor, *, exact: bool) -> Tensor: ...


class RmsNorm:
    """RMSNorm over the last dimension: hidden states, or each head of q and k."""

    __slots__ = ("eps", "plus_one", "weight")

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool = False) -> None:
        self.weight, self.eps, self.plus_one = weight, eps, plus_one

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one, exact=exact)


class LayerNorm:
    """LayerNorm over the last dimension."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, exact=exact)


class HeadsLayerNorm:
    """LayerNorm of each head of [tokens, heads, head_dim], its weights [heads, head_dim] (Cohere); one rounding."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.float(), eps

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        wide = x.to(torch.float32, memory_format=torch.contiguous_format)
        return (layer_norm(wide, None, None, self.eps, exact=exact) * self.weight).to(x.dtype)


class ProjectionRmsNorm:
    """RMSNorm over all heads of a token together, [tokens, heads, head_dim] (OLMoE)."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return rms_norm(x.flatten(1), self.weight, self.eps, exact=exact).view(x.shape)
