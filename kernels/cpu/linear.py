"""Linear layers on weights that oneDNN has packed once.

Measured on two Zen 4 cores, bfloat16, 1024 → 2816, weights from memory: 209 µs at one row against 305 µs for
`F.linear`, 294 against 592 at sixteen rows. The packing made for 16 rows was as good for every count from 1 to 256.

`torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise` are private to torch (its compiler uses them), so
they are tried once on a small product; where they are missing or wrong, `F.linear` takes their place.

A step of few rows only waits for its weights; in bfloat16 it reads them faster as a checkpoint has them, row by row
(kernels/cpu/compiled/linear.py). `pack_linear` with `by_rows` keeps them so beside the packed ones: twice the memory
for about twice the speed of a lone stream. Exact steps never take that way.

Exactness: in float32 the product of a row is bit-equal for every number of rows from two on, fused additions and gates
included; a single row takes another path inside oneDNN and is therefore doubled. In bfloat16 that holds on AVX-512, but
with AMX only up to 32 rows: beyond, the sum over in_features is cut by the number of rows. So exact bfloat16 goes in
tiles of 32. `F.linear` needs its rows padded to a multiple of 16 for the same promise. tests/kernels/test_exactness.py
checks all of it.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import choice
from kernels.cpu.activation import silu_and_mul

PACKING_ROWS = 16
FALLBACK_ROWS = 16
EXACT_BFLOAT16_ROWS = 32
FEW_ROWS = 4


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """`weight` is opaque to others when `packed`, else [out_features, in_features], as `by_rows` is if there is one."""

    weight: Tensor
    bias: Tensor | None
    packed: bool
    by_rows: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class PackedGate:
    """The two halves of a gate side by side in one product, or one after the other.

    One product is 60 of 430 µs faster at one row (fewer, larger reads) and as fast at 512. Two let oneDNN fuse the
    gate; its vectorised sigmoid has no scalar tail, unlike `F.silu`, and is therefore exact.
    """

    parts: tuple[PackedLinear, ...]


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> PackedLinear:
    rows = weight.contiguous() if by_rows and _supports_rows(weight, bias) else None
    if weight.dtype in (torch.float32, torch.bfloat16) and can_pack(weight.dtype):
        return PackedLinear(_reorder(weight), bias, packed=True, by_rows=rows)
    return PackedLinear(weight.contiguous(), bias, packed=False, by_rows=rows)


def linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    if exact and _needs_tiles(x, packed):
        return torch.cat([linear(tile, packed, exact=True) for tile in x.split(EXACT_BFLOAT16_ROWS)])
    if exact and _needs_padding(x, packed):
        return linear(_pad(x, packed), packed, exact=True)[: x.shape[0]]
    if not exact and _takes_rows(x, packed):
        from kernels.cpu.compiled import linear as compiled

        return compiled.linear(x, packed.by_rows, packed.bias)
    if packed.packed:
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
    return F.linear(x, packed.weight, packed.bias)


def linear_add(x: Tensor, packed: PackedLinear, residual: Tensor, *, exact: bool = False) -> Tensor:
    if exact and _needs_tiles(x, packed):
        tiles = zip(x.split(EXACT_BFLOAT16_ROWS), residual.split(EXACT_BFLOAT16_ROWS), strict=True)
        return torch.cat([linear_add(tile, packed, beside, exact=True) for tile, beside in tiles])
    if exact and _needs_padding(x, packed):
        return linear_add(_pad(x, packed), packed, _pad(residual, packed), exact=True)[: x.shape[0]]
    if not exact and _takes_rows(x, packed):
        from kernels.cpu.compiled import linear as compiled

        return compiled.linear(x, packed.by_rows, packed.bias, residual)
    if packed.packed:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, packed.bias, "add")
    return F.linear(x, packed.weight, packed.bias).add_(residual)


def pack_gated(weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> PackedGate:
    """float32 is always exact and wants oneDNN's own sigmoid; bfloat16 wants one product."""
    if weight.dtype != torch.float32:
        return PackedGate((pack_linear(weight, bias, by_rows=by_rows),))
    biases = (None, None) if bias is None else bias.chunk(2)
    return PackedGate(tuple(pack_linear(*half) for half in zip(weight.chunk(2), biases, strict=True)))


def gated_linear(x: Tensor, packed: PackedGate, *, exact: bool = False) -> Tensor:
    if not exact and _takes_rows(x, packed.parts[0]) and len(packed.parts) == 1:
        from kernels.cpu.compiled import linear as compiled

        return compiled.gated_linear(x, packed.parts[0].by_rows, packed.parts[0].bias)
    if len(packed.parts) == 1:
        return silu_and_mul(linear(x, packed.parts[0], exact=exact), exact=exact)
    gate, up = packed.parts
    if exact and _needs_padding(x, gate):
        return gated_linear(_pad(x, gate), packed, exact=True)[: x.shape[0]]
    if gate.packed:
        gated = torch.ops.mkldnn._linear_pointwise(x, gate.weight, gate.bias, "swish", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gated, up.weight, up.bias, "mul")
    return silu_and_mul(torch.cat((linear(x, gate), linear(x, up)), dim=-1), exact=exact)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the private operations and they compute what we think."""
    weight = torch.linspace(-1, 1, 24 * 16).view(24, 16).to(dtype)
    x, other = torch.linspace(-1, 1, 32).view(2, 16).to(dtype), torch.linspace(0, 1, 48).view(2, 24).to(dtype)
    expected = F.linear(x.float(), weight.float())
    try:
        packed = _reorder(weight)
        gated = torch.ops.mkldnn._linear_pointwise(x, packed, None, "swish", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, "add")
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    close = functools.partial(torch.allclose, rtol=2e-2, atol=2e-2)
    return close(gated.float(), F.silu(expected)) and close(added.float(), expected + other.float())


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKING_ROWS)


def _supports_rows(weight: Tensor, bias: Tensor | None) -> bool:
    if not choice.is_compiled(weight):
        return False
    from kernels.cpu.compiled import linear as compiled

    return compiled.supports(weight, bias)


def _takes_rows(x: Tensor, packed: PackedLinear) -> bool:
    return packed.by_rows is not None and x.shape[0] <= FEW_ROWS and x.is_contiguous()


def _needs_tiles(x: Tensor, packed: PackedLinear) -> bool:
    return packed.packed and x.dtype == torch.bfloat16 and x.shape[0] > EXACT_BFLOAT16_ROWS


def _needs_padding(x: Tensor, packed: PackedLinear) -> bool:
    return x.shape[0] == 1 if packed.packed else x.shape[0] % FALLBACK_ROWS != 0


def _pad(x: Tensor, packed: PackedLinear) -> Tensor:
    multiple = 2 if packed.packed else FALLBACK_ROWS
    return F.pad(x, (0, 0, 0, -x.shape[0] % multiple))
