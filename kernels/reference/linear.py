"""A matrix product with a constant weight, and the two fusions that a decoder layer wants from it.

x is [rows, in_features] in the dtype of the weight, as is the result. At the least a call reads the weight, x and what
is added once, and writes the result once: out · in + rows · (in + out) numbers, most of them the weight's
where rows are few.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight as it came: [out_features, in_features], and its bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    return PackedLinear(weight, bias)


def pack_gated(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    return PackedLinear(weight, bias)


def linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b: [rows, out_features]."""
    return F.linear(x, packed.weight, packed.bias)


def linear_add(x: Tensor, packed: PackedLinear, residual: Tensor, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b + residual, which is [rows, out_features] as the result is."""
    return F.linear(x, packed.weight, packed.bias) + residual


def gated_linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] = x · Wᵀ + b: [rows, out_features / 2] (SwiGLU; Shazeer, 2020)."""
    gate, up = F.linear(x, packed.weight, packed.bias).chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
