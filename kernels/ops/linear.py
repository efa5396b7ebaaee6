"""Products with constant weights.

`x` is [rows, in_features], contiguous, in the dtype of the weight; results are [rows, out_features] in that dtype.
With `exact`, a row's result has the same bits whatever the other rows are and however many there are. The fused bodies
raise ValueError where shapes, dtypes or strides do not fit, and take rows of `x` and `residual` that lie apart.
"""

from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from kernels.cpu import linear as cpu
from kernels.ops import choice

if TYPE_CHECKING:
    from kernels.fused import linear as fused

PackedLinear: TypeAlias = "cpu.PackedLinear | fused.PackedLinear"
PackedGate: TypeAlias = "cpu.PackedGate | fused.PackedGate"


def _body(of_cpu: bool) -> ModuleType:
    if of_cpu:
        return cpu
    from kernels.fused import linear as fused

    return fused


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> PackedLinear:
    """Bring a weight [out_features, in_features] into the form its device likes best.

    The result is opaque: hand it to the functions below. It may hold a copy; drop `weight` to save memory. `by_rows`
    keeps `weight` as well where that makes steps of few rows faster (bfloat16 on a CPU).
    """
    if choice.is_fused(weight):
        return _body(False).pack_linear(weight, bias)
    return cpu.pack_linear(weight, bias, by_rows=by_rows)


def pack_gated(weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> PackedGate:
    """The same for a merged gate and up projection, [2 * width, in_features], the gate first."""
    if choice.is_fused(weight):
        return _body(False).pack_gated(weight, bias)
    return cpu.pack_gated(weight, bias, by_rows=by_rows)


def linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b."""
    return _body(isinstance(packed, cpu.PackedLinear)).linear(x, packed, exact=exact)


def linear_add(x: Tensor, packed: PackedLinear, residual: Tensor, *, exact: bool = False) -> Tensor:
    """y = x · Wᵀ + b + residual; `residual` is [rows, out_features] and is left as it was."""
    return _body(isinstance(packed, cpu.PackedLinear)).linear_add(x, packed, residual, exact=exact)


def gated_linear(x: Tensor, packed: PackedGate, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] = x · Wᵀ + b, the first half of a SwiGLU layer; [rows, out_features / 2]."""
    return _body(isinstance(packed, cpu.PackedGate)).gated_linear(x, packed, exact=exact)
