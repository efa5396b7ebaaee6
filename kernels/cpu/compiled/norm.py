"""RMSNorm of bfloat16 rows in one pass."""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import (
    ADDRESS,
    COUNT,
    NUMBER,
    bits_at,
    kernel,
    num_threads,
    share,
    structure,
    this_thread,
)  # fmt: skip
from kernels.cpu.compiled.vectors import narrow, widen

_Arguments = structure("_Arguments", x=ADDRESS, weight=ADDRESS, out=ADDRESS, num_rows=COUNT, width=COUNT, eps=NUMBER)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight for contiguous rows [rows, width]."""
    out = torch.empty_like(x)
    _rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps, work=x.numel())
    return out


@kernel(_Arguments)
def _rms_norm(pointer):
    given = carray(pointer, 1)[0]
    shape = (given.num_rows, given.width)
    x, out, weight = bits_at(given.x, shape), bits_at(given.out, shape), bits_at(given.weight, (given.width,))
    for part in range(this_thread(), given.num_shares, num_threads()):
        first, end = share(given.num_rows, part, given.num_shares)
        for row in range(first, end):
            squares = np.float32(0)
            for d in range(given.width):
                value = widen(x[row, d])
                squares += value * value
            scale = np.float32(1) / np.sqrt(squares / np.float32(given.width) + given.eps)
            for d in range(given.width):
                out[row, d] = narrow(widen(x[row, d]) * scale * widen(weight[d]))
