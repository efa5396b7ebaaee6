"""Attention over a paged cache, one row and one query at a time, in float32: slow, and meant to be read. The second
form, tiled with an online softmax, says what the fused kernels do.

A page is `pool[block]`, laid out [layer][K/V][head][slot][dim]. Row r of a step owns the tokens
`query_starts[r]:query_starts[r + 1]`, the last of which sits at position `context_lens[r] - 1`; position p of
row r lives in block `block_tables[r, p // block_size]` at slot `p % block_size`.

q and results are [tokens, heads, head_dim], the pool [blocks, layers, 2, kv_heads, block_size, head_dim], both of any
floating dtype. The scores are scaled dot products (Vaswani et al., 2017); query head h reads
KV head h // (heads / kv_heads) (grouped queries; Ainslie et al., 2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step looks like to every layer: `block_tables` [rows, blocks] and `slots` [tokens], the latter counted
    through the pool (block * block_size + slot)."""

    query_starts: list[int]
    context_lens: list[int]
    block_tables: Tensor
    slots: Tensor
    window: int | None


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
    return AttentionPlan(query_starts, context_lens, block_tables, slots, window)


def write_kv(kv: Tensor, pool: Tensor, layer_id: int, plan: AttentionPlan) -> None:
    """pool[block, layer, k or v, head, slot] = kv[token, k or v, head], what is not finite becoming zero.

    `kv` is [tokens, 2, kv_heads, head_dim]; it is read once and written once.
    """
    block_size = pool.shape[4]
    kv = torch.nan_to_num(kv, nan=0.0, posinf=0.0, neginf=0.0)
    for token_id, slot in enumerate(plan.slots.tolist()):
        pool[slot // block_size, layer_id, :, :, slot % block_size] = kv[token_id]


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
    """softmax(scores) · V over the positions that each query may see, with these scores:

    s = q · Kᵀ * scale; with a soft cap c (Gemma 2) c * tanh(s / c); plus slope * (key's - query's position) of each
    head (ALiBi, Press et al., 2021). A sink (gpt-oss) is one more score per head, whose share of the softmax is lost.

    `alibi_slopes` and `sinks` are [heads]. At the least q is read, the result written, and of each row the K and V that
    its queries see read once: 2 · kv_heads · head_dim numbers a position.
    """
    num_heads, num_kv_heads = q.shape[1], pool.shape[3]
    slopes = torch.zeros(num_heads) if alibi_slopes is None else alibi_slopes.float()
    lost = torch.full((num_heads,), -torch.inf) if sinks is None else sinks.float()
    out = torch.empty_like(q)
    for row, context_len in enumerate(plan.context_lens):
        start, end = plan.query_starts[row], plan.query_starts[row + 1]
        keys, values = (
            each.repeat_interleave(num_heads // num_kv_heads, dim=0)
            for each in _gather_row(pool, layer_id, plan.block_tables[row], context_len)
        )
        for token_id in range(start, end):
            position = context_len - (end - token_id)
            first = 0 if plan.window is None else max(0, position - plan.window + 1)
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,hpd->hp", q[token_id].float(), keys[:, seen]) * scale
            if soft_cap > 0:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            scores += slopes[:, None] * (torch.arange(first, position + 1) - position)
            weights = torch.softmax(torch.cat((scores, lost[:, None]), dim=1), dim=1)[:, :-1]
            out[token_id] = torch.einsum("hp,hpd->hd", weights, values[:, seen]).to(q.dtype)
    return out


def flash_attention(
    q: Tensor,
    pool: Tensor,
    layer_id: int,
    plan: AttentionPlan,
    scale: float,
    *,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tile_queries: int = 16,
    tile_positions: int = 32,
) -> Tensor:
    """What `paged_attention` gives, without ever holding all scores of a query (FlashAttention-2; Dao, 2023).

    A tile of a row's queries walks over tiles of positions. Of each query and head three things are kept: the highest
    score so far (peak m), the sum of e^(s - m) (weight w) and of e^(s - m) · value (total t). A tile that raises the
    peak to m' first shrinks what is there by e^(m - m'). In the end a sink is one more score without a value, and t / w
    the answer. Each tile of K and V is read once per tile of queries: 2 · kv_heads · head_dim numbers a position.
    """
    num_heads, num_kv_heads = q.shape[1], pool.shape[3]
    slopes = torch.zeros(num_heads) if alibi_slopes is None else alibi_slopes.float()
    out = torch.empty_like(q)
    for row, context_len in enumerate(plan.context_lens):
        start, end = plan.query_starts[row], plan.query_starts[row + 1]
        keys, values = (
            each.repeat_interleave(num_heads // num_kv_heads, dim=0)
            for each in _gather_row(pool, layer_id, plan.block_tables[row], context_len)
        )
        for first in range(start, end, tile_queries):
            tokens = slice(first, min(first + tile_queries, end))
            places = torch.arange(tokens.start, tokens.stop) + context_len - end
            oldest = 0 if plan.window is None else max(0, int(places[0]) - plan.window + 1)
            queries = q[tokens].float().transpose(0, 1)
            peak = torch.full((num_heads, len(places), 1), -torch.inf)
            weight, total = torch.zeros_like(peak), torch.zeros_like(queries)
            for begin in range(oldest, int(places[-1]) + 1, tile_positions):
                positions = torch.arange(begin, min(begin + tile_positions, int(places[-1]) + 1))
                scores = queries @ keys[:, positions].transpose(1, 2) * scale
                scores = _masked(scores, positions - places[:, None], plan.window, soft_cap, slopes)
                peak, weight, total = _joined(peak, weight, total, scores, values[:, positions])
            if sinks is not None:
                lost = sinks.float()[:, None, None].expand_as(peak)
                peak, weight, total = _joined(peak, weight, total, lost, torch.zeros(num_heads, 1, q.shape[2]))
            out[tokens] = (total / weight).transpose(0, 1).to(q.dtype)
    return out


def _masked(scores: Tensor, distance: Tensor, window: int | None, soft_cap: float, slopes: Tensor) -> Tensor:
    """Scores [heads, queries, positions] capped and slanted, -infinity where a query may not look. `distance` [queries,
    positions] is the key's less the query's position."""
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    hidden = distance > 0 if window is None else (distance > 0) | (distance <= -window)
    return (scores + slopes[:, None, None] * distance).masked_fill(hidden, -torch.inf)


def _joined(
    peak: Tensor, weight: Tensor, total: Tensor, scores: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Peak and weight [heads, queries, 1] and total [heads, queries, head_dim] with another tile of scores [heads,
    queries, positions] and values [heads, positions, head_dim]. Where nothing was seen yet, the peak is -infinity."""
    higher = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
    level = higher.masked_fill(higher == -torch.inf, 0.0)
    shares, shrink = torch.exp(scores - level), torch.exp(peak - level)
    return higher, weight * shrink + shares.sum(dim=-1, keepdim=True), total * shrink + shares @ values


def _gather_row(pool: Tensor, layer_id: int, block_table: Tensor, context_len: int) -> tuple[Tensor, Tensor]:
    """K and V of one row, each [num_kv_heads, context_len, head_dim]."""
    block_size = pool.shape[4]
    positions = torch.arange(context_len)
    pages = pool[block_table.long()[positions // block_size], layer_id, :, :, positions % block_size]
    keys, values = pages.permute(1, 2, 0, 3).float()
    return keys, values
