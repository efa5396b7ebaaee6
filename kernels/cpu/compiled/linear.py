"""Products of few rows, which only wait for the weights: each weight is read once, row by row as a checkpoint has it.

oneDNN reads its packed weights in one stream per core. Eight rows side by side, asked for 512 bytes ahead, keep more
reads under way. Measured on two cores of an Emerald Rapids (bfloat16, weights from memory, µs, against oneDNN's):

| out × in | 1 row | 2 rows | 4 rows | 8 rows |
| --- | --- | --- | --- | --- |
| 5632 × 1024 | 461 / 913 | 656 / 875 | 756 / 740 | 1115 / 970 |
| 1024 × 2816 | 259 / 512 | 262 / 508 | 341 / 500 | 522 / 504 |
| 1536 × 1024 | 161 / 293 | 169 / 277 | 219 / 292 | 312 / 287 |
"""

import numpy as np
from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import (
    ADDRESS,
    COUNT,
    bits_at,
    inlined,
    kernel,
    num_threads,
    share,
    structure,
    this_thread,
)  # fmt: skip
from kernels.cpu.compiled.vectors import multiply_rows, narrow, silu, widen

STEP = 32
SIDE_BY_SIDE = 8
BYTES_AHEAD = 512

_Arguments = structure(
    "_Arguments",
    x=ADDRESS, weight=ADDRESS, bias=ADDRESS, residual=ADDRESS, out=ADDRESS, num_rows=COUNT, out_features=COUNT,
    in_features=COUNT,
)  # fmt: skip


def supports(weight: Tensor, bias: Tensor | None) -> bool:
    if bias is not None and bias.dtype != weight.dtype:
        return False
    return weight.shape[0] % (2 * SIDE_BY_SIDE) == 0 and weight.shape[1] % STEP == 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias + residual for [rows, in] and [out, in], contiguous, that `supports` accepts."""
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    addresses = (x, weight, bias, residual, out)
    _linear(
        *(0 if each is None else each.data_ptr() for each in addresses), *out.shape, x.shape[1], work=weight.numel()
    )
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(g) * u with [g, u] = x · weightᵀ + bias; [rows, out / 2]."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    addresses = (x, weight, bias, None, out)
    _gated(*(0 if each is None else each.data_ptr() for each in addresses), *out.shape, x.shape[1], work=weight.numel())
    return out


@inlined
def _widened(address, num_rows, width):
    """bfloat16 rows as float32, a copy."""
    narrow_rows, wide = bits_at(address, (num_rows, width)), np.empty((num_rows, width), np.float32)
    for row in range(num_rows):
        for d in range(width):
            wide[row, d] = widen(narrow_rows[row, d])
    return wide


@inlined
def _multiply(weight, wide, products):
    """products[row, i] = weight row i · row of `wide`, for SIDE_BY_SIDE weight rows from the address `weight` on."""
    num_rows, width = wide.shape
    for row in range(0, num_rows - num_rows % 2, 2):
        multiply_rows(
            weight, width * 2, wide.ctypes.data + row * width * 4, width * 4,
            products.ctypes.data + row * SIDE_BY_SIDE * 4, width // STEP, SIDE_BY_SIDE, 2, BYTES_AHEAD,
        )  # fmt: skip
    if num_rows % 2:
        row = num_rows - 1
        multiply_rows(
            weight, width * 2, wide.ctypes.data + row * width * 4, width * 4,
            products.ctypes.data + row * SIDE_BY_SIDE * 4, width // STEP, SIDE_BY_SIDE, 1, BYTES_AHEAD,
        )  # fmt: skip


@kernel(_Arguments)
def _linear(pointer):
    given = carray(pointer, 1)[0]
    num_rows, width, out_features = given.num_rows, given.in_features, given.out_features
    wide, products = _widened(given.x, num_rows, width), np.empty((num_rows, SIDE_BY_SIDE), np.float32)
    bias, residual = bits_at(given.bias, (out_features,)), bits_at(given.residual, (num_rows, out_features))
    out = bits_at(given.out, (num_rows, out_features))
    for part in range(this_thread(), given.num_shares, num_threads()):
        first, end = share(out_features // SIDE_BY_SIDE, part, given.num_shares)
        for group in range(first, end):
            begin = group * SIDE_BY_SIDE
            _multiply(given.weight + begin * width * 2, wide, products)
            for row in range(num_rows):
                for i in range(SIDE_BY_SIDE):
                    value = products[row, i]
                    if given.bias != 0:
                        value += widen(bias[begin + i])
                    if given.residual != 0:
                        value += widen(residual[row, begin + i])
                    out[row, begin + i] = narrow(value)


@kernel(_Arguments)
def _gated(pointer):
    given = carray(pointer, 1)[0]
    num_rows, width, half = given.num_rows, given.in_features, given.out_features
    wide = _widened(given.x, num_rows, width)
    gates, ups = (np.empty((num_rows, SIDE_BY_SIDE), np.float32), np.empty((num_rows, SIDE_BY_SIDE), np.float32))
    bias, out = bits_at(given.bias, (2 * half,)), bits_at(given.out, (num_rows, half))
    for part in range(this_thread(), given.num_shares, num_threads()):
        first, end = share(half // SIDE_BY_SIDE, part, given.num_shares)
        for group in range(first, end):
            begin = group * SIDE_BY_SIDE
            _multiply(given.weight + begin * width * 2, wide, gates)
            _multiply(given.weight + (half + begin) * width * 2, wide, ups)
            for row in range(num_rows):
                for i in range(SIDE_BY_SIDE):
                    gate, up = gates[row, i], ups[row, i]
                    if given.bias != 0:
                        gate += widen(bias[begin + i])
                        up += widen(bias[half + begin + i])
                    out[row, begin + i] = narrow(silu(gate) * up)
