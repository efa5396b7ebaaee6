"""Decode attention that reads pages where they lie: each byte of the cache once, nothing gathered.

For each row and KV head, the scores of its whole group of query heads are taken while a key is in registers, then one
softmax, then the same with values. The next pages are asked for ahead of time, since a page is too short for the
processor to notice that it is being read in order.

Measured on two cores of an Emerald Rapids (bfloat16, 16 / 4 heads of 64, 16 rows of 64 to 514 positions, pages from
memory): 0.35 ms, where gathering and multiplying with torch takes 1.22 and reading the pages once at that machine's 13
GB/s 0.37. One row of 192: 29 against 160 µs. Without asking ahead: 0.54 ms. 16 rows of 560 that share their first 512:
0.47 ms, with pages of their own 0.85.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import carray
from torch import Tensor

from kernels.cpu.compiled.threads import (
    ADDRESS,
    COUNT,
    NUMBER,
    bits_at,
    float32_at,
    inlined,
    int32_at,
    int64_at,
    kernel,
    num_threads,
    structure,
    this_thread,
)  # fmt: skip
from kernels.cpu.compiled.vectors import LANES, add_weighted, dot_heads, exp, narrow, prefetch_page, tanh, widen

REGISTERS = 16
"""Vectors that the sums of the heads attended together may fill; the rest of 32 holds values and weights."""
PAGES_AHEAD = 2

_Arguments = structure(
    "_Arguments",
    q=ADDRESS, out=ADDRESS, pages=ADDRESS, block_bytes=COUNT, value_bytes=COUNT, num_tokens=COUNT, num_kv_heads=COUNT,
    tokens=ADDRESS, contexts=ADDRESS, firsts=ADDRESS, tables=ADDRESS, num_rows=COUNT, max_blocks=COUNT,
    borders=ADDRESS, slopes=ADDRESS, sinks=ADDRESS, scale=NUMBER, soft_cap=NUMBER,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows of one query each; what all layers of a step share.

    tokens      int64 [rows]: which token of q each row is
    contexts    int64 [rows]; row r sees positions [firsts[r], contexts[r]), at least one
    firsts      int64 [rows]
    tables      int32 [rows, blocks], contiguous
    borders     int64: share i has the (KV head, row) pairs borders[i] to borders[i + 1], head by head: rows that share
                pages read them one after another, the first from memory and the others from a cache
    """

    tokens: np.ndarray
    contexts: np.ndarray
    firsts: np.ndarray
    tables: np.ndarray
    borders: np.ndarray

    @property
    def num_shares(self) -> int:
        return len(self.borders) - 1


def plan_rows(
    tokens: np.ndarray, contexts: np.ndarray, firsts: np.ndarray, tables: np.ndarray, num_kv_heads: int
) -> DecodeRows:
    """Shares the rows out: consecutive (KV head, row) pairs of about the same number of positions to each thread."""
    done = np.cumsum(np.tile(contexts - firsts, num_kv_heads))
    num_shares = torch.get_num_threads()
    goals = done[-1] * np.arange(1, num_shares) // num_shares
    borders = np.concatenate(([0], np.searchsorted(done, goals, side="right"), [len(done)]))
    return DecodeRows(
        *(np.ascontiguousarray(each, np.int64) for each in (tokens, contexts, firsts)),
        np.ascontiguousarray(tables, np.int32),
        borders.astype(np.int64),
    )


def attend(
    q: Tensor,
    out: Tensor,
    pool: Tensor,
    layer_id: int,
    rows: DecodeRows,
    scale: float,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Writes the rows' tokens of `out`; q and out are [tokens, heads, head_dim], contiguous. kernels.ops.attention says
    what is made of the scores."""
    num_tokens, num_heads, head_dim = q.shape
    _, _, _, num_kv_heads, block_size, _ = pool.shape
    block_bytes, layer_bytes, value_bytes = (stride * pool.element_size() for stride in pool.stride()[:3])
    decode = _decode_kernel(num_heads // num_kv_heads, head_dim, block_size)
    decode(
        q.data_ptr(), out.data_ptr(), pool.data_ptr() + layer_id * layer_bytes, block_bytes, value_bytes,
        num_tokens, num_kv_heads, rows.tokens.ctypes.data, rows.contexts.ctypes.data, rows.firsts.ctypes.data,
        rows.tables.ctypes.data, *rows.tables.shape, rows.borders.ctypes.data,
        *(0 if each is None else each.data_ptr() for each in (alibi_slopes, sinks)), scale, soft_cap,
        num_shares=rows.num_shares,
    )  # fmt: skip


@inlined
def _score(keys, block_bytes, table, first, end, queries, scores, together, groups, head_dim, block_size):
    """scores[head, position - first] for the positions [first, end)."""
    for block in range(first // block_size, (end + block_size - 1) // block_size):
        if (block + PAGES_AHEAD) * block_size < end:
            prefetch_page(keys + table[block + PAGES_AHEAD] * block_bytes, block_size, head_dim)
        begin = block * block_size
        page = keys + table[block] * block_bytes
        for position in range(max(first, begin), min(begin + block_size, end)):
            key = page + (position - begin) * head_dim * 2
            for group in range(groups):
                dot_heads(
                    key,
                    queries.ctypes.data + group * together * queries.strides[0],
                    scores.ctypes.data + group * together * scores.strides[0] + (position - first) * 4,
                    scores.strides[0],
                    together,
                    head_dim,
                )


@inlined
def _reshape_scores(scores, count, soft_cap, slopes, first_head):
    """Caps the first `count` scores of each head where `soft_cap` is not 0, and slants them by the head's slope where
    there is an address of slopes; the last score is the query's own."""
    num_heads = scores.shape[0]
    if soft_cap > np.float32(0):
        for head in range(num_heads):
            for at in range(count):
                scores[head, at] = soft_cap * tanh(scores[head, at] / soft_cap)
    if slopes != 0:
        slope = float32_at(slopes, (first_head + num_heads,))
        for head in range(num_heads):
            for at in range(count):
                scores[head, at] += slope[first_head + head] * np.float32(at - count + 1)


@inlined
def _softmax(scores, count, sinks, first_head):
    """Each row's first `count` columns become weights that sum to one, less what the head's sink takes where there is
    an address of sinks. Up to 15 columns behind them are overwritten."""
    padded = (count + LANES - 1) // LANES * LANES
    largest = np.empty(LANES, np.float32)
    for head in range(scores.shape[0]):
        scores[head, count:padded] = np.float32(-np.inf)
        largest[:] = np.float32(-np.inf)
        for at in range(0, padded, LANES):
            for lane in range(LANES):
                largest[lane] = max(largest[lane], scores[head, at + lane])
        top = largest.max()
        total = np.float32(0)
        if sinks != 0:
            sink = float32_at(sinks, (first_head + scores.shape[0],))[first_head + head]
            top = max(top, sink)
            total = exp(sink - top)
        for at in range(count):
            weight = exp(scores[head, at] - top)
            scores[head, at] = weight
            total += weight
        for at in range(count):
            scores[head, at] /= total


@inlined
def _weigh(values, block_bytes, table, first, end, weights, sums, together, groups, head_dim, block_size):
    """sums[head] += Σ weights[head, position - first] · value of the position, over [first, end)."""
    for block in range(first // block_size, (end + block_size - 1) // block_size):
        if (block + PAGES_AHEAD) * block_size < end:
            prefetch_page(values + table[block + PAGES_AHEAD] * block_bytes, block_size, head_dim)
        begin = max(first, block * block_size)
        for group in range(groups):
            add_weighted(
                values + table[block] * block_bytes + (begin - block * block_size) * head_dim * 2,
                weights.ctypes.data + group * together * weights.strides[0] + (begin - first) * 4,
                weights.strides[0],
                sums.ctypes.data + group * together * sums.strides[0],
                min((block + 1) * block_size, end) - begin,
                together,
                head_dim,
            )


@functools.cache
def _decode_kernel(heads_per_kv: int, head_dim: int, block_size: int) -> Callable[..., None]:
    """The kernel of a model: these three are constants in it."""
    together = _heads_together(heads_per_kv, head_dim)
    groups = heads_per_kv // together

    @kernel(_Arguments)
    def decode(pointer):
        given = carray(pointer, 1)[0]
        num_rows, num_kv_heads = given.num_rows, given.num_kv_heads
        shape = (given.num_tokens, num_kv_heads * heads_per_kv, head_dim)
        q, out, borders = bits_at(given.q, shape), bits_at(given.out, shape), int64_at(given.borders, (1 << 30,))
        tokens, tables = int64_at(given.tokens, (num_rows,)), int32_at(given.tables, (num_rows, given.max_blocks))
        contexts, firsts = int64_at(given.contexts, (num_rows,)), int64_at(given.firsts, (num_rows,))
        scores = np.empty((heads_per_kv, given.max_blocks * block_size + LANES), np.float32)
        queries = np.empty((heads_per_kv, head_dim), np.float32)
        sums = np.empty((heads_per_kv, head_dim), np.float32)
        for part in range(this_thread(), given.num_shares, num_threads()):
            for task in range(borders[part], borders[part + 1]):
                kv_head, row = task // num_rows, task % num_rows
                token, head = tokens[row], kv_head * heads_per_kv
                for i in range(heads_per_kv):
                    for d in range(head_dim):
                        queries[i, d] = widen(q[token, head + i, d]) * given.scale
                keys = given.pages + kv_head * block_size * head_dim * 2
                values = keys + given.value_bytes
                first, end, table = firsts[row], contexts[row], tables[row]
                _score(
                    keys, given.block_bytes, table, first, end, queries, scores, together, groups, head_dim, block_size
                )
                prefetch_page(values + table[first // block_size] * given.block_bytes, block_size, head_dim)
                _reshape_scores(scores, end - first, given.soft_cap, given.slopes, head)
                _softmax(scores, end - first, given.sinks, head)
                sums[:] = np.float32(0)
                _weigh(
                    values, given.block_bytes, table, first, end, scores, sums, together, groups, head_dim, block_size
                )
                for i in range(heads_per_kv):
                    for d in range(head_dim):
                        out[token, head + i, d] = narrow(sums[i, d])

    return decode


def _heads_together(heads_per_kv: int, head_dim: int) -> int:
    fitting = max(1, REGISTERS * LANES // head_dim)
    return max(count for count in range(1, heads_per_kv + 1) if heads_per_kv % count == 0 and count <= fitting)
