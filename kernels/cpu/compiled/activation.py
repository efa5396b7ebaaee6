"""The gate of a SwiGLU layer in one pass."""

import numpy as np
from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import ADDRESS, COUNT, bits_at, kernel, share, structure
from kernels.cpu.compiled.vectors import exp, narrow, widen

_Arguments = structure("_Arguments", gate_up=ADDRESS, out=ADDRESS, num_rows=COUNT, width=COUNT)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """g / (1 + e⁻ᵍ) * u for contiguous gate_up = [g, u], [rows, 2 * width] → [rows, width]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    _silu_and_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, width, work=gate_up.numel())
    return out


@kernel(_Arguments)
def _silu_and_mul(pointer):
    given = carray(pointer, 1)[0]
    width = given.width
    gate_up, out = bits_at(given.gate_up, (given.num_rows, 2 * width)), bits_at(given.out, (given.num_rows, width))
    first, end = share(given.num_rows, given.num_shares)
    for row in range(first, end):
        for d in range(width):
            gate = widen(gate_up[row, d])
            # Beyond 88 e⁻ᵍ would overflow; g / (1 + e⁸⁸) is zero in bfloat16 already.
            away = exp(min(-gate, np.float32(88)))
            out[row, d] = narrow(gate / (np.float32(1) + away) * widen(gate_up[row, width + d]))
