"""Paged attention on a CPU: whole pages gathered head-major, grouped query heads folded into rows.

One `index_select` over (block, layer, K/V, head) lines yields K and V as [heads, context, head_dim], contiguous;
its indices are the same for every layer but for an offset, so a step computes them once. Decode rows of similar
context are attended together; each prompt chunk is attended by itself.

Both modes fold the query heads that share a KV head and multiply, softmax, multiply. The exact mode
- gathers whole tiles of 128 absolute positions, so that a sequence's tiles never depend on chunk or batch,
- pads the folded query rows to a multiple of 16, so that a row's products never depend on its neighbours,
- sums P · V tile by tile (one product over the whole context would be blocked differently at each length),
- computes in float32 whatever the cache holds.
Scores may be one product, for they sum over head_dim only, and the softmax kernel works row by row, where masked
positions add exact zeros. tests/kernels/test_exactness.py holds all this to the bit.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_TILE = 128
EXACT_ROWS = 16
EXACT_DIMS = 8
"""head_dim is padded to a multiple of this: MKL treats rows of P · V unlike one another at 6 and 10 columns."""
CHUNK_SCORES = 1 << 22
"""Scores held at once by a prompt chunk: 16 MiB in float32, about what the caches hold."""
BUCKET_WASTE = 1.25
"""Decode rows share a product while their padded contexts cost at most this much of the true ones."""
BUCKET_SLACK = 256
"""Positions of padding that are always allowed: another group costs more than they do."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows attended together: decode rows of similar context, or one prompt chunk.

    `tokens` selects their queries; `lines` are gather indices in the order [K/V, row, head, block]; the first
    `width` of the gathered positions are attended. `mask` is True where a query may not look,
    [rows, queries, width]; `dead` are the lines of V, as [row, head, position] flattened, that no query may see.
    Both are None where everything is seen.
    """

    tokens: slice | Tensor
    num_rows: int
    num_queries: int
    width: int
    lines: Tensor
    mask: Tensor | None
    dead: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    slot_lines: Tensor
    groups: list[RowGroup]
    exact: bool


@dataclass(frozen=True, slots=True)
class _Span:
    """A run of queries of one row and the cached positions [first, context_len) that they may see."""

    row: int
    start: int
    num_queries: int
    first: int
    context_len: int

    @property
    def num_positions(self) -> int:
        return self.context_len - self.first


@dataclass(frozen=True, slots=True)
class _Planner:
    """The numbers that every part of planning needs; `block_lines` counts the [slot, dim] pages in a block."""

    block_tables: Tensor
    block_size: int
    block_lines: int
    num_heads: int
    num_kv_heads: int
    window: int | None
    exact: bool

    @property
    def alignment(self) -> int:
        return math.lcm(self.block_size, EXACT_TILE) if self.exact else self.block_size

    def span(self, row: int, start: int, num_queries: int, context_len: int) -> _Span:
        oldest = 0 if self.window is None else max(0, context_len - num_queries - self.window + 1)
        return _Span(row, start, num_queries, oldest // self.alignment * self.alignment, context_len)

    def blocks(self, span: _Span, num_blocks: int) -> Tensor:
        """The blocks that hold a span, [num_blocks] int64, padded with its first one."""
        first, last = span.first // self.block_size, -(-span.context_len // self.block_size)
        blocks = self.block_tables[span.row, first].long().repeat(num_blocks)
        blocks[: last - first] = self.block_tables[span.row, first:last]
        return blocks


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
    _, num_layers, _, num_kv_heads, block_size, _ = pool.shape
    block_lines = num_layers * 2 * num_kv_heads
    planner = _Planner(block_tables, block_size, block_lines, num_heads, num_kv_heads, window, exact)
    decodes: list[_Span] = []
    groups: list[RowGroup] = []
    for row, context_len in enumerate(context_lens):
        start, num_queries = query_starts[row], query_starts[row + 1] - query_starts[row]
        if num_queries == 1:
            decodes.append(planner.span(row, start, 1, context_len))
        elif num_queries > 1:
            groups += [
                _plan_spans(planner, [span]) for span in _cut_chunk(planner, row, start, num_queries, context_len)
            ]
    groups += [_plan_spans(planner, bucket) for bucket in _bucket(decodes)]
    return AttentionPlan(_slot_lines(planner, slots), groups, exact)


def write_kv(kv: Tensor, pool: Tensor, layer_id: int, plan: AttentionPlan) -> None:
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    num_tokens = plan.slot_lines.shape[0] // (2 * num_kv_heads)
    layer = pool.view(-1, head_dim)[layer_id * 2 * num_kv_heads * block_size :]
    layer.index_put_((plan.slot_lines,), kv[:num_tokens].reshape(-1, head_dim))


def paged_attention(q: Tensor, pool: Tensor, layer_id: int, plan: AttentionPlan, scale: float) -> Tensor:
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    pages = pool.view(-1, block_size * head_dim)[layer_id * 2 * num_kv_heads :]
    attend = _attend_exact if plan.exact else _attend
    out = torch.zeros_like(q) if plan.exact else torch.empty_like(q)  # an exact step may carry a padding token
    for group in plan.groups:
        keys, values = _gather(pages, group, num_kv_heads, head_dim)
        queries = q[group.tokens].view(group.num_rows, group.num_queries, num_kv_heads, -1, head_dim)
        out[group.tokens] = attend(queries, keys, values, group, scale)
    return out


def _gather(pages: Tensor, group: RowGroup, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V of a group, each [rows * kv_heads, width, head_dim], what is dead in V set to zero."""
    gathered = pages.index_select(0, group.lines).view(2, group.num_rows * num_kv_heads, -1, head_dim)
    if group.dead is not None:
        gathered[1].view(-1, head_dim).index_fill_(0, group.dead, 0.0)
    keys, values = gathered[:, :, : group.width]
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, group: RowGroup, scale: float) -> Tensor:
    """The fast path; queries are [rows, queries, kv_heads, heads of one KV head, head_dim], the result the same."""
    num_rows, num_queries, num_kv_heads, folds, head_dim = queries.shape
    folded = queries.transpose(1, 2).reshape(num_rows * num_kv_heads, num_queries * folds, head_dim)
    scores = torch.bmm(folded * scale, keys.transpose(1, 2))
    weights = torch.softmax(_mask(scores, group, num_kv_heads), dim=-1)
    attended = torch.bmm(weights, values)
    return _unfold(attended, queries)


def _attend_exact(queries: Tensor, keys: Tensor, values: Tensor, group: RowGroup, scale: float) -> Tensor:
    """The same on whole tiles, in float32."""
    num_rows, num_queries, num_kv_heads, folds, head_dim = queries.shape
    num_folded = num_queries * folds
    folded = queries.transpose(1, 2).reshape(num_rows * num_kv_heads, num_folded, head_dim).float() * scale
    folded = F.pad(folded, (0, 0, 0, -num_folded % EXACT_ROWS))
    scores = torch.bmm(folded, keys.float().transpose(1, 2))
    _mask(scores[:, :num_folded], group, num_kv_heads)
    weights = torch.softmax(scores, dim=-1)
    values = F.pad(values, (0, -head_dim % EXACT_DIMS))
    attended = folded.new_zeros(*folded.shape[:2], values.shape[2])
    for tile in range(0, group.width, EXACT_TILE):
        seen = slice(tile, tile + EXACT_TILE)
        attended.baddbmm_(weights[:, :, seen], values[:, seen].float())
    return _unfold(attended[:, :num_folded, :head_dim], queries).to(queries.dtype)


def _mask(scores: Tensor, group: RowGroup, num_kv_heads: int) -> Tensor:
    """Lower the scores [rows * kv_heads, queries * folds, width] of what may not be seen, in place."""
    if group.mask is not None:
        by_query = scores.view(group.num_rows, num_kv_heads, group.num_queries, -1, group.width)
        by_query.masked_fill_(group.mask[:, None, :, None], torch.finfo(scores.dtype).min)
    return scores


def _unfold(attended: Tensor, queries: Tensor) -> Tensor:
    """Back from [rows * kv_heads, queries * folds, head_dim] to [rows * queries, heads, head_dim]."""
    num_rows, num_queries, num_kv_heads, folds, head_dim = queries.shape
    by_head = attended.reshape(num_rows, num_kv_heads, num_queries, folds, head_dim).transpose(1, 2)
    return by_head.reshape(num_rows * num_queries, num_kv_heads * folds, head_dim)


def _slot_lines(planner: _Planner, slots: Tensor) -> Tensor:
    """Where each (token, K/V, head) goes among the pool's [head_dim] lines, for layer 0."""
    block, offset = slots // planner.block_size, slots % planner.block_size
    heads = torch.arange(2 * planner.num_kv_heads) * planner.block_size
    return ((block * (planner.block_lines * planner.block_size) + offset)[:, None] + heads).flatten()


def _cut_chunk(planner: _Planner, row: int, start: int, num_queries: int, context_len: int) -> list[_Span]:
    """A prompt chunk in pieces whose scores stay in the caches, each seeing only what it must."""
    step = max(EXACT_ROWS, CHUNK_SCORES // (planner.num_heads * context_len))
    pieces = []
    for begin in range(0, num_queries, step):
        end = min(begin + step, num_queries)
        pieces.append(planner.span(row, start + begin, end - begin, context_len - num_queries + end))
    return pieces


def _bucket(decodes: list[_Span]) -> list[list[_Span]]:
    """Decode rows, longest first, in buckets whose padding wastes little."""
    buckets: list[list[_Span]] = []
    longest = total = 0
    for span in sorted(decodes, key=lambda span: (-span.num_positions, span.row)):
        total += span.num_positions
        if not buckets or longest * (len(buckets[-1]) + 1) > BUCKET_WASTE * total + BUCKET_SLACK:
            buckets.append([])
            longest = total = span.num_positions
        buckets[-1].append(span)
    return buckets


def _plan_spans(planner: _Planner, spans: list[_Span]) -> RowGroup:
    """Spans of equal numbers of queries, the longest first."""
    num_rows, num_queries = len(spans), spans[0].num_queries
    widest = spans[0].num_positions
    width = -(-widest // planner.alignment) * planner.alignment if planner.exact else widest
    num_blocks = -(-width // planner.block_size)
    blocks = torch.stack([planner.blocks(span, num_blocks) for span in spans])
    heads = torch.arange(2 * planner.num_kv_heads).view(2, 1, -1, 1)
    mask = _hidden(planner, spans, num_blocks * planner.block_size)
    unseen = mask.all(dim=1)
    unseen[:, width:] = False  # not attended at all
    dead = unseen[:, None].expand(-1, planner.num_kv_heads, -1).flatten().nonzero().flatten()
    mask = mask[:, :, :width]
    return RowGroup(
        tokens=_tokens(spans),
        num_rows=num_rows,
        num_queries=num_queries,
        width=width,
        lines=(blocks[:, None] * planner.block_lines + heads).flatten(),
        mask=mask if bool(mask.any()) else None,
        dead=dead if dead.numel() else None,
    )


def _hidden(planner: _Planner, spans: list[_Span], width: int) -> Tensor:
    """True where a query may not look, [rows, queries, width]."""
    positions = torch.arange(width) + torch.tensor([span.first for span in spans])[:, None, None]
    ends = torch.tensor([span.context_len for span in spans])[:, None, None]
    queries = ends - spans[0].num_queries + torch.arange(spans[0].num_queries)[:, None]
    hidden = positions > queries
    if planner.window is not None:
        hidden |= positions <= queries - planner.window
    return hidden


def _tokens(spans: list[_Span]) -> slice | Tensor:
    """The queries of a group among the step's tokens; a slice where they lie side by side."""
    starts = [span.start for span in spans]
    if len(spans) == 1 or starts == list(range(starts[0], starts[0] + len(starts))):
        return slice(starts[0], starts[0] + sum(span.num_queries for span in spans))
    return torch.tensor(starts)
