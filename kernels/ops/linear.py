"""Products with constant weights.

`x` is [rows, in_features], contiguous, in the dtype of the weight; results are [rows, out_features] in that dtype.
With `exact`, a row's result has the same bits whatever the other rows are and however many there are.
"""

from typing import TypeAlias

from torch import Tensor

from kernels.cpu import linear as cpu
from kernels.reference import linear as reference

PackedLinear: TypeAlias = cpu.PackedLinear | reference.PackedLinear
PackedGate: TypeAlias = cpu.PackedGate | reference.PackedLinear


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Bring a weight [out_features, in_features] into the form its device likes best.

    The result is opaque: hand it to the functions below. It holds a copy; drop `weight` to save memory.
    """
    if weight.device.type == "cpu":
        return cpu.pack_linear(weight, bias)
    return reference.pack_linear(weight, bias)


def pack_gated(weight: Tensor, bias: Tensor | None = None) -> PackedGate:
    """The same for a merged gate and up projection, [2 * width, in_features], the gate first."""
    if weight.device.type == "cpu":
        return cpu.pack_gated(weight, bias)
    return reference.pack_gated(weight, bias)


def linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b."""
    if isinstance(packed, cpu.PackedLinear):
        return cpu.linear(x, packed, exact=exact)
    return reference.linear(x, packed, exact=exact)


def linear_add(x: Tensor, packed: PackedLinear, residual: Tensor, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b + residual; `residual` is [rows, out_features] and is left as it was."""
    if isinstance(packed, cpu.PackedLinear):
        return cpu.linear_add(x, packed, residual, exact=exact)
    return reference.linear_add(x, packed, residual, exact=exact)


def gated_linear(x: Tensor, packed: PackedGate, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] = x · Wᵀ + b, the first half of a SwiGLU layer; [rows, out_features / 2]."""
    if isinstance(packed, cpu.PackedGate):
        return cpu.gated_linear(x, packed, exact=exact)
    return reference.gated_linear(x, packed, exact=exact)
