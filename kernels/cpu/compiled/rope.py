"""All between a layer's merged projection and its attention in one pass over the tokens."""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import (
    ADDRESS,
    COUNT,
    NUMBER,
    bits_at,
    inlined,
    int64_at,
    kernel,
    num_threads,
    share,
    structure,
    this_thread,
)  # fmt: skip
from kernels.cpu.compiled.vectors import narrow, widen

_Arguments = structure(
    "_Arguments",
    heads=ADDRESS, q=ADDRESS, pool=ADDRESS, slots=ADDRESS, cos=ADDRESS, sin=ADDRESS, q_norm=ADDRESS, k_norm=ADDRESS,
    num_tokens=COUNT, num_heads=COUNT, num_blocks=COUNT, num_layers=COUNT, num_kv_heads=COUNT, block_size=COUNT,
    head_dim=COUNT, layer_id=COUNT, rotary_dim=COUNT, interleaved=COUNT, eps=NUMBER, offset=NUMBER,
)  # fmt: skip


@inlined
def _load(head, norm, eps, offset, values):
    """A head as float32, divided by its root mean square and multiplied with the weights at `norm`, each with `offset`
    added, unless that address is 0."""
    dims = len(values)
    for d in range(dims):
        values[d] = widen(head[d])
    if norm != 0:
        weight, squares = bits_at(norm, (dims,)), np.float32(0)
        for d in range(dims):
            squares += values[d] * values[d]
        scale = np.float32(1) / np.sqrt(squares / np.float32(dims) + eps)
        for d in range(dims):
            values[d] = values[d] * scale * (widen(weight[d]) + offset)


@inlined
def _turn(values, cos, sin, interleaved, out):
    """Turns the first len(cos) elements; pair i is elements i and i + len(cos) / 2 or, interleaved, 2 i and 2 i + 1."""
    half = len(cos) // 2
    if interleaved != 0:
        for i in range(half):
            first, second, c, s = values[2 * i], values[2 * i + 1], widen(cos[i]), widen(sin[i])
            out[2 * i] = narrow(first * c - second * s)
            out[2 * i + 1] = narrow(second * c + first * s)
    else:
        for i in range(half):
            first, second, c, s = values[i], values[half + i], widen(cos[i]), widen(sin[i])
            out[i] = narrow(first * c - second * s)
            out[half + i] = narrow(second * c + first * s)
    for d in range(2 * half, len(values)):
        out[d] = narrow(values[d])


@inlined
def _copy_finite(bits, out):
    """NaNs and infinities, whose exponent is full, become zeros."""
    for d in range(len(out)):
        out[d] = bits[d] if bits[d] & np.uint16(0x7F80) != np.uint16(0x7F80) else np.uint16(0)


@kernel(_Arguments)
def _rotate_and_write(pointer):
    given = carray(pointer, 1)[0]
    num_tokens, num_heads, num_kv_heads, dims = given.num_tokens, given.num_heads, given.num_kv_heads, given.head_dim
    heads = bits_at(given.heads, (num_tokens, num_heads + 2 * num_kv_heads, dims))
    q, slots = bits_at(given.q, (num_tokens, num_heads, dims)), int64_at(given.slots, (num_tokens,))
    rotary_dim, interleaved = given.rotary_dim, given.interleaved
    cos, sin = bits_at(given.cos, (num_tokens, rotary_dim)), bits_at(given.sin, (num_tokens, rotary_dim))
    pool = bits_at(given.pool, (given.num_blocks, given.num_layers, 2, num_kv_heads, given.block_size, dims))
    values = np.empty(dims, np.float32)
    for part in range(this_thread(), given.num_shares, num_threads()):
        first, end = share(num_tokens, part, given.num_shares)
        for token in range(first, end):
            block, offset = slots[token] // given.block_size, slots[token] % given.block_size
            for head in range(num_heads):
                _load(heads[token, head], given.q_norm, given.eps, given.offset, values)
                _turn(values, cos[token], sin[token], interleaved, q[token, head])
            for kv_head in range(num_kv_heads):
                _load(heads[token, num_heads + kv_head], given.k_norm, given.eps, given.offset, values)
                key = pool[block, given.layer_id, 0, kv_head, offset]
                _turn(values, cos[token], sin[token], interleaved, key)
                _copy_finite(key, key)
                value = heads[token, num_heads + num_kv_heads + kv_head]
                _copy_finite(value, pool[block, given.layer_id, 1, kv_head, offset])


def rotate_and_write(
    heads: Tensor,
    pool: Tensor,
    layer_id: int,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    *,
    interleaved: bool = False,
    plus_one: bool = False,
) -> Tensor:
    """Norms of q and k where there are any, rope, K and V into their pages; returns q.

    heads       [tokens, num_heads + 2 * num_kv_heads, head_dim]
    pool        [blocks, layers, 2, num_kv_heads, block_size, head_dim], written at `slots` int64; the first tokens
                have one, the q of those behind them is zero
    cos, sin    [tokens, rotary_dim], None: no rope
    """
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = pool.shape
    num_heads = heads.shape[1] - 2 * num_kv_heads
    new = torch.empty if len(slots) == heads.shape[0] else torch.zeros
    q = new(heads.shape[0], num_heads, head_dim, dtype=heads.dtype)
    optional = [None if each is None else each.contiguous() for each in (cos, sin, q_norm, k_norm)]
    heads, slots = heads.contiguous(), slots.contiguous()
    _rotate_and_write(
        heads.data_ptr(), q.data_ptr(), pool.data_ptr(), slots.data_ptr(),
        *(0 if each is None else each.data_ptr() for each in optional),
        len(slots), num_heads, num_blocks, num_layers, num_kv_heads, block_size, head_dim, layer_id,
        0 if cos is None else cos.shape[1], int(interleaved), eps, 1.0 if plus_one else 0.0,
        work=heads.numel(),
    )  # fmt: skip
    return q
