"""Paged attention on a CPU: whole pages gathered head-major, grouped query heads folded into rows.

Decode rows in bfloat16 go to a compiled kernel instead, which gathers nothing (kernels/cpu/compiled/attention.py);
what follows is for prompts, for float32, for exact steps and for machines without numba.

One `index_select` over (block, layer, K/V, head) lines yields K and V as [heads, context, head_dim], contiguous, in a
buffer that all layers share; its indices are the same for every layer but for an offset. (Selecting whole blocks and
turning them within the caches is faster alone, 263 against 377 µs for 16 rows of 288 positions, but slower between
the layers of a model, whose weights leave nothing in the caches.) Decode rows of similar context are attended
together; a prompt chunk is attended in pieces of 64 queries, each seeing only what it must.

Measured in bfloat16 on one Zen 4 core, 16 / 4 heads of 64: a prompt of 512 in 6.9 ms (pieces of 512: 20, torch's
SDPA: 15), 16 decode rows at 512 in about 0.9 ms (SDPA with folded heads: 1.2 and more). A width that is no multiple
of 16 makes the same decode product 8 times slower, hence the padding.

Both modes multiply, softmax and multiply. Scores that are capped, slanted by ALiBi or given sinks are widened to
float32 first; a sink is a column in front of the others, with empty ones that keep these where vectors expect them.

The exact mode
- gathers whole tiles of 128 absolute positions, so that a sequence's tiles never depend on chunk or batch,
- pads the folded query rows to a multiple of 16 and head_dim to one of 8, so that a row's products never depend on
  its neighbours,
- sums P · V tile by tile (one product over the whole context would be blocked differently at each length),
- computes in float32 whatever the cache holds.
Scores may be one product, for they sum over head_dim only, and the softmax kernel works row by row, where masked
positions add exact zeros. tests/kernels/test_exactness.py holds all this to the bit.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import choice
from kernels.cpu.norm import rms_norm
from kernels.cpu.rope import apply_rope_

if TYPE_CHECKING:
    from kernels.cpu.compiled.attention import DecodeRows

EXACT_TILE = 128
EXACT_ROWS = 16
EXACT_DIMS = 8
"""head_dim is padded to a multiple of this: MKL treats rows of P · V unlike one another at 6 and 10 columns."""
FAST_TILE = 16
PIECE_QUERIES = 64
COMPILED_DIMS = 16
"""A head_dim that is no multiple of this does not fill the compiled kernel's vectors."""
FAST_WASTE = (1.5, 1536)
EXACT_WASTE = (1.1, 128)
MOST_POSITIONS = 4608
"""A group of more padded positions than this loses more by missing caches than it saves in operations: 16 rows of 560
in one group took 27.5 ms a step for attention, in two 25, in four 24, in eight 35; of 64 to 514 22, 17.6, 20 and 24."""
"""Decode rows are attended together while their padded contexts cost at most (this many times the true ones, and this
many positions more). 16 rows of 64 to 514 in a model: bfloat16 18 to 20 ms a step in one group, 20 to 25 in three, for
the code of another group comes cold from memory; float32, whose positions cost more, 70 to 95 in one, 48 to 55 in four.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries attended at once, the same number for each row of their group.

    `tokens` selects them; they see the gathered positions [begin, end). `hidden` is True where a query may not look,
    [rows, queries, end - begin - masked_from], for the columns from `masked_from` on; None where all is seen.
    `own_columns` are those of the queries' own positions, row after row, counted from `begin`.
    """

    tokens: slice | Tensor
    num_queries: int
    begin: int
    end: int
    masked_from: int
    hidden: Tensor | None
    own_columns: Sequence[int]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows gathered together: decode rows of similar context, or the one row of a prompt chunk.

    `lines` are gather indices for layer 0 in the order [K/V, row, head, block].
    """

    num_rows: int
    lines: Tensor
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """`slot_lines` says where each (token, K/V, head) goes among the [head_dim] lines of layer 0; `slots` as given.

    `buffer` [lines, block_size * head_dim] holds one group's pages at a time. Memory fresh from the system costs a
    fault per 4 KiB, so it is taken once for all layers.
    """

    slot_lines: Tensor
    slots: Tensor
    groups: list[RowGroup]
    decodes: "DecodeRows | None"
    buffer: Tensor
    exact: bool


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What a layer makes of its scores, as kernels.ops.attention says."""

    soft_cap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.soft_cap == 0 and self.alibi_slopes is None and self.sinks is None


@dataclass(frozen=True, slots=True)
class _Span:
    """A row's new tokens, from `start` on among the step's, and its cached positions [first, context_len)."""

    row: int
    start: int
    num_queries: int
    first: int
    context_len: int

    @property
    def num_positions(self) -> int:
        return self.context_len - self.first


def plan_attention(
    pool: Tensor,
    query_starts: list[int],
    context_lens: list[int],
    block_tables: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    window: int | None = None,
    exact: bool = False,
) -> AttentionPlan:
    planner = _Planner(pool, block_tables, window, exact)
    decodes, groups = [], []
    for row, context_len in enumerate(context_lens):
        span = planner.span(row, query_starts[row], query_starts[row + 1] - query_starts[row], context_len)
        if span.num_queries == 1:
            decodes.append(span)
        elif span.num_queries > 1:
            groups.append(planner.prompt(span))
    compiled = None
    if decodes and not exact and choice.is_compiled(pool) and pool.shape[5] % COMPILED_DIMS == 0:
        compiled = planner.compiled_decodes(decodes)
    else:
        groups += [planner.decodes(bucket) for bucket in _bucket(decodes, *(EXACT_WASTE if exact else FAST_WASTE))]
    most_lines = max((len(group.lines) for group in groups), default=0)
    buffer = torch.empty(most_lines, pool.shape[4] * pool.shape[5], dtype=pool.dtype)
    return AttentionPlan(planner.slot_lines(slots), slots, groups, compiled, buffer, exact)


def rotate_and_write(
    heads: Tensor,
    pool: Tensor,
    layer_id: int,
    plan: AttentionPlan,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    exact: bool = False,
) -> Tensor:
    num_kv_heads = pool.shape[3]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if choice.is_compiled(heads):
        from kernels.cpu.compiled import rope as compiled

        return compiled.rotate_and_write(
            heads, pool, layer_id, plan.slots, cos, sin, q_norm, k_norm, eps, interleaved=interleaved, plus_one=plus_one
        )
    if q_norm is not None and k_norm is not None:
        heads[:, :num_heads] = rms_norm(heads[:, :num_heads], q_norm, eps, plus_one=plus_one, exact=exact)
        keys = heads[:, num_heads : num_heads + num_kv_heads]
        keys.copy_(rms_norm(keys, k_norm, eps, plus_one=plus_one, exact=exact))
    if cos is not None and sin is not None:
        apply_rope_(heads[:, : num_heads + num_kv_heads], cos, sin, interleaved=interleaved)
    write_kv(heads[:, num_heads:], pool, layer_id, plan)
    return heads[:, :num_heads]


def write_kv(kv: Tensor, pool: Tensor, layer_id: int, plan: AttentionPlan) -> None:
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    num_tokens = plan.slot_lines.shape[0] // (2 * num_kv_heads)
    finite = torch.nan_to_num(kv[:num_tokens], nan=0.0, posinf=0.0, neginf=0.0)
    layer = pool.view(-1, head_dim)[layer_id * 2 * num_kv_heads * block_size :]
    layer.index_put_((plan.slot_lines,), finite.view(-1, head_dim))


def paged_attention(
    q: Tensor,
    pool: Tensor,
    layer_id: int,
    plan: AttentionPlan,
    scale: float,
    *,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    num_heads, scoring = q.shape[1], _Scoring(soft_cap, alibi_slopes, sinks)
    attend = _attend_exact if plan.exact else _attend
    scaled = (q.float() if plan.exact else q) * scale
    out = q.new_zeros(q.shape) if plan.exact else q.new_empty(q.shape)  # an exact step may carry a padding token
    if plan.decodes is not None:
        from kernels.cpu.compiled import attention as compiled

        compiled.attend(q.contiguous(), out, pool, layer_id, plan.decodes, scale, soft_cap, alibi_slopes, sinks)
    for group in plan.groups:
        keys, values = _gather(pool, layer_id, group, plan.buffer)
        if plan.exact:
            keys, values = keys.float(), values.float()
        for piece in group.pieces:
            folded = _fold(scaled[piece.tokens], group.num_rows, pool.shape[3])
            seen = slice(piece.begin, piece.end)
            attended = attend(folded, keys[:, seen], values[:, seen], piece, group.num_rows, scoring)
            out[piece.tokens] = _unfold(attended, group.num_rows, num_heads).to(q.dtype)
    return out


def _gather(pool: Tensor, layer_id: int, group: RowGroup, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a group, each [rows * kv_heads, positions, head_dim], in the buffer."""
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    pages = pool.view(-1, block_size * head_dim)[layer_id * 2 * num_kv_heads :]
    gathered = torch.index_select(pages, 0, group.lines, out=buffer[: len(group.lines)])
    keys, values = gathered.view(2, group.num_rows * num_kv_heads, -1, head_dim)
    return keys, values


def _fold(queries: Tensor, num_rows: int, num_kv_heads: int) -> Tensor:
    """[rows * queries, heads, head_dim] → [rows * kv_heads, heads of one KV head * queries, head_dim]."""
    _, num_heads, head_dim = queries.shape
    by_head = queries.view(num_rows, -1, num_heads, head_dim).transpose(1, 2)
    return by_head.reshape(num_rows * num_kv_heads, -1, head_dim)


def _unfold(attended: Tensor, num_rows: int, num_heads: int) -> Tensor:
    """The inverse of `_fold`."""
    head_dim = attended.shape[2]
    by_head = attended.reshape(num_rows, num_heads, -1, head_dim).transpose(1, 2)
    return by_head.reshape(-1, num_heads, head_dim)


def _attend(folded: Tensor, keys: Tensor, values: Tensor, piece: Piece, num_rows: int, scoring: _Scoring) -> Tensor:
    scores = torch.bmm(folded, keys.transpose(1, 2))
    return torch.bmm(_weights(scores, folded.shape[1], piece, num_rows, scoring), values)


def _attend_exact(
    folded: Tensor, keys: Tensor, values: Tensor, piece: Piece, num_rows: int, scoring: _Scoring
) -> Tensor:
    """The same on whole tiles; everything is float32 here."""
    _, num_folded, head_dim = folded.shape
    folded = F.pad(folded, (0, 0, 0, -num_folded % EXACT_ROWS))
    scores = torch.bmm(folded, keys.transpose(1, 2))
    weights = _weights(scores, num_folded, piece, num_rows, scoring)
    values = F.pad(values, (0, -head_dim % EXACT_DIMS))
    attended = folded.new_zeros(*folded.shape[:2], values.shape[2])
    for tile in range(0, values.shape[1], EXACT_TILE):
        seen = slice(tile, tile + EXACT_TILE)
        attended.baddbmm_(weights[:, :, seen], values[:, seen])
    return attended[:, :num_folded, :head_dim]


def _weights(scores: Tensor, num_folded: int, piece: Piece, num_rows: int, scoring: _Scoring) -> Tensor:
    """The softmax of scores [rows * kv_heads, num_folded or more, width], of which the first `num_folded` count."""
    if scoring.is_plain:
        _mask(scores[:, :num_folded], piece, num_rows)
        return torch.softmax(scores, dim=-1)
    wide = scores.float()
    if scoring.soft_cap > 0:
        wide = torch.tanh(wide / scoring.soft_cap) * scoring.soft_cap
    counting = wide[:, :num_folded]
    if scoring.alibi_slopes is not None:
        folds = num_folded // piece.num_queries
        by_head = counting.view(num_rows, -1, folds, piece.num_queries, wide.shape[2])
        own = torch.tensor(piece.own_columns).view(num_rows, 1, 1, piece.num_queries, 1)
        by_head += scoring.alibi_slopes.view(-1, folds, 1, 1) * (torch.arange(wide.shape[2]) - own)
    _mask(counting, piece, num_rows)
    if scoring.sinks is None:
        return torch.softmax(wide, dim=-1).to(scores.dtype)
    lost = wide.new_full((*wide.shape[:2], FAST_TILE), torch.finfo(wide.dtype).min)
    lost[:, :num_folded, 0] = (
        scoring.sinks.repeat_interleave(piece.num_queries).view(-1, num_folded).repeat(num_rows, 1)
    )
    return torch.softmax(torch.cat((lost, wide), dim=-1), dim=-1)[:, :, FAST_TILE:].to(scores.dtype)


def _mask(scores: Tensor, piece: Piece, num_rows: int) -> None:
    """Lower the scores [rows * kv_heads, folds * queries, width] of what may not be seen, in place."""
    if piece.hidden is not None:
        folds = scores.shape[1] // piece.num_queries
        by_query = scores.view(num_rows, -1, folds, piece.num_queries, scores.shape[2])
        lowest = torch.finfo(scores.dtype).min
        by_query[..., piece.masked_from :].masked_fill_(piece.hidden[:, None, None], lowest)


def _bucket(decodes: list[_Span], most_times: float, most_more: int) -> list[list[_Span]]:
    """Decode rows, longest first, in buckets whose padding wastes little and whose pages stay near the core."""
    buckets: list[list[_Span]] = []
    longest = total = 0
    for span in sorted(decodes, key=lambda span: (-span.num_positions, span.row)):
        total += span.num_positions
        padded = longest * (len(buckets[-1]) + 1) if buckets else 0
        if not buckets or padded > min(most_times * total + most_more, MOST_POSITIONS):
            buckets.append([])
            longest = total = span.num_positions
        buckets[-1].append(span)
    return buckets


class _Planner:
    """Turns rows into groups; holds what all of them need."""

    def __init__(self, pool: Tensor, block_tables: Tensor, window: int | None, exact: bool) -> None:
        _, num_layers, _, self.num_kv_heads, self.block_size, _ = pool.shape
        self.num_layers = num_layers
        self.block_tables, self.window = block_tables, window
        self.tile = EXACT_TILE if exact else FAST_TILE
        self.alignment = math.lcm(self.block_size, self.tile)

    def span(self, row: int, start: int, num_queries: int, context_len: int) -> _Span:
        return _Span(row, start, num_queries, self._oldest(context_len - num_queries), context_len)

    def slot_lines(self, slots: Tensor) -> Tensor:
        block, offset = slots // self.block_size, slots % self.block_size
        heads = torch.arange(2 * self.num_kv_heads)
        return (
            (block * (self.num_layers * len(heads) * self.block_size) + offset)[:, None]
            .add(heads * self.block_size)
            .flatten()
        )

    def decodes(self, spans: list[_Span]) -> RowGroup:
        """One query per row, the longest row first; the others are padded to its width."""
        width = self._aligned(spans[0].num_positions)
        contexts = [span.num_positions for span in spans]
        positions = torch.arange(width)
        hidden = positions >= torch.tensor(contexts)[:, None]
        masked_from = min(contexts)
        if self.window is not None:
            hidden |= positions < torch.tensor(contexts)[:, None] - self.window
            masked_from = 0
        own_columns = [num_positions - 1 for num_positions in contexts]
        piece = Piece(_tokens(spans), 1, 0, width, masked_from, _or_none(hidden[:, None, masked_from:]), own_columns)
        return self._group(spans, width, [piece])

    def compiled_decodes(self, spans: list[_Span]) -> "DecodeRows":
        from kernels.cpu.compiled.attention import plan_rows

        contexts = np.array([span.context_len for span in spans])
        firsts = np.zeros_like(contexts) if self.window is None else np.maximum(0, contexts - self.window)
        tables = self.block_tables.numpy()[[span.row for span in spans]]
        return plan_rows(np.array([span.start for span in spans]), contexts, firsts, tables, self.num_kv_heads)

    def prompt(self, span: _Span) -> RowGroup:
        """One row, cut where its absolute positions are multiples of 64."""
        width = self._aligned(span.num_positions)
        first_query = span.context_len - span.num_queries
        cuts = range((first_query // PIECE_QUERIES + 1) * PIECE_QUERIES, span.context_len, PIECE_QUERIES)
        borders = [first_query, *cuts, span.context_len]
        pieces = [self._piece(span, begin, end) for begin, end in itertools.pairwise(borders)]
        return self._group([span], width, pieces)

    def _piece(self, span: _Span, begin: int, end: int) -> Piece:
        """The queries at positions [begin, end) of a row."""
        oldest = self._oldest(begin) - span.first
        newest = oldest + self._aligned(end - span.first - oldest)
        queries = torch.arange(begin, end)[:, None]
        masked_from = 0 if self.window is not None else begin - span.first - oldest
        positions = torch.arange(span.first + oldest + masked_from, span.first + newest)
        hidden = positions > queries
        if self.window is not None:
            hidden |= positions <= queries - self.window
        offset = span.start - (span.context_len - span.num_queries)
        tokens = slice(begin + offset, end + offset)
        own_columns = range(begin - span.first - oldest, end - span.first - oldest)
        return Piece(tokens, end - begin, oldest, newest, masked_from, _or_none(hidden[None]), own_columns)

    def _group(self, spans: list[_Span], width: int, pieces: list[Piece]) -> RowGroup:
        blocks = torch.stack([self._blocks(span, width // self.block_size) for span in spans])
        heads = torch.arange(2 * self.num_kv_heads).view(2, 1, -1, 1)
        lines = blocks[:, None] * (self.num_layers * 2 * self.num_kv_heads) + heads
        return RowGroup(len(spans), lines.flatten(), pieces)

    def _blocks(self, span: _Span, num_blocks: int) -> Tensor:
        """The blocks that hold a span, [num_blocks] int64, padded with its first one."""
        first, last = span.first // self.block_size, -(-span.context_len // self.block_size)
        used = self.block_tables[span.row, first:last].long()
        return used if last - first == num_blocks else torch.cat((used, used[:1].expand(num_blocks - last + first)))

    def _oldest(self, query: int) -> int:
        """The first position that a query sees, rounded down to a tile's border."""
        oldest = 0 if self.window is None else max(0, query - self.window + 1)
        return oldest // self.alignment * self.alignment

    def _aligned(self, num_positions: int) -> int:
        return -(-num_positions // self.alignment) * self.alignment


def _or_none(hidden: Tensor) -> Tensor | None:
    return hidden if hidden.numel() and bool(hidden.any()) else None


def _tokens(spans: list[_Span]) -> slice | Tensor:
    """The queries of decode rows among the step's tokens; a slice where they lie side by side."""
    starts = [span.start for span in spans]
    if starts == list(range(starts[0], starts[0] + len(starts))):
        return slice(starts[0], starts[0] + len(starts))
    return torch.tensor(starts)
