"""The gate of a SwiGLU layer in one pass."""

from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import ADDRESS, COUNT, bits_at, kernel, num_threads, share, structure, this_thread
from kernels.cpu.compiled.vectors import narrow, silu, widen

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
    for part in range(this_thread(), given.num_shares, num_threads()):
        first, end = share(given.num_rows, part, given.num_shares)
        for row in range(first, end):
            for d in range(width):
                out[row, d] = narrow(silu(widen(gate_up[row, d])) * widen(gate_up[row, width + d]))
