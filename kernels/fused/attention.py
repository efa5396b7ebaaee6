"""Attention over a paged cache: flash attention (Dao, 2023) for prompt chunks, split over the context for decode rows.

A page is `pool[block]`, [layer][K/V][head][slot][dim]. The query heads of one KV head share each K and V tile: `group`
of them per query are folded into the rows of a tile. Scores are kept in base 2; all sums are float32.

Prompt chunks: one program per tile of queries and KV head walks over all it may see. Decode rows: each context is cut
into even splits, whose length follows from all contexts of the step; a fixed number of programs takes (row, split, KV
head) in turn from a list that the device itself counts (`_count_splits_kernel`), so a CUDA graph can hold the launch. A
program reads little before its first K, for each read that depends on another costs the latency of memory anew. It
leaves the splits of a row behind without waiting for its stores; `_merge_kernel` adds them in their order. (Tickets, as
linear.py draws them, would save that launch, but a program that waits for its stores computes nothing meanwhile.) With
`exact` decode rows are prompt chunks of one query: one kernel, one shape of tile, K and V in tiles at absolute
positions; a query's bits then depend on nothing else in the step.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import capability, cdiv, launch, next_power_of_2

SPLIT_PROGRAMS, LEAST_SPLIT, MOST_SPLIT = 264, 256, 1024
"""A context of a decode row is cut into even splits of about as many positions as give a step so many programs (two for
each multiprocessor of an H200), within these bounds, give or take a half: fewer leave memory idle, and each begins and
ends with what it cannot overlap."""


class Tile(NamedTuple):
    """How a program walks over a context: `rows` are queries times heads of a group, `columns` positions at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


PROMPT, LARGE_PROMPT = Tile(128, 128, 8, 3), Tile(256, 64, 8, 3)
"""Of compute capabilities 9.0 and 10.0; the large one spills some registers, and is the fastest of all even so."""
EXACT_PROMPT = Tile(64, 64, 4, 4)
WIDE_PROMPT, WIDE_EXACT_PROMPT = Tile(128, 32, 8, 3), Tile(64, 32, 8, 3)
OLD_PROMPT, OLD_EXACT_PROMPT, OLD_WIDE_PROMPT = Tile(128, 32, 8, 4), Tile(64, 32, 4, 3), Tile(64, 32, 8, 3)
FLOAT32_EXACT_PROMPT = Tile(32, 16, 8, 2)
"""Wide: heads of more than 256 bytes. Old: of other compute capabilities. One stage fetches block ids. Products of
float32 are made of single multiplications, whose operands a larger tile would not find room for in registers."""
LARGE_PROMPT_PROGRAMS = 256
"""Large tiles are faster where there are enough of them: two for each multiprocessor of an H100."""
DECODE = Tile(16, 32, 4, 6)
"""At least so many rows: the fewest that a tensor core multiplies."""
DECODE_REGISTERS, WIDE_DECODE_REGISTERS = 128, 168
"""Of a thread, so that four programs share a multiprocessor, or three where heads are wider than 128. Where many heads
share a KV head there is no limit, for their tile needs more."""
MERGED = 16
"""Splits of a row that are read side by side: one after another, each would cost the latency of memory."""
MAX_DECODE_ROWS = 1024
PROGRAMS = 2112
"""Programs of a decode launch: sixteen for each of an H200's 132 multiprocessors."""
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of a step share, on the device, int32 but for the slots.

    query_starts [rows + 1], context_lens [rows], block_tables [rows, max_blocks], slots [tokens] int64, token_rows
    [tokens]: 0, 1, …, where what was gathered for each token lies.
    tiles [n, 2]: row and first query (within the row) of each tile of a prompt chunk.
    decode_rows [m]: the rows of one query; split_starts [m + 1]: the splits before each of them; splits [splits, 4]: a
    split's row, the positions that it begins and ends with, and whether it is the row's only one.
    partials [splits, heads, head_dim] and peaks [splits, heads, 2]: unfinished sums, maxima and weights, float32, of
    rows in several splits.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    token_rows: Tensor
    tiles: Tensor
    decode_rows: Tensor
    split_starts: Tensor
    splits: Tensor
    partials: Tensor
    peaks: Tensor
    window: int | None
    tile: Tile
    """Of prompt chunks."""
    padded: bool = False
    """Some tokens belong to no row: their results are zeros."""


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
    """See kernels.ops.attention. Counts the splits on the device; reads no tensor."""
    device, head_dim = pool.device, pool.shape[5]
    counts = [end - start for start, end in itertools.pairwise(query_starts)]
    decodes = [] if exact else [row for row, count in enumerate(counts) if count == 1]
    if len(decodes) > MAX_DECODE_ROWS:
        raise ValueError(f"{len(decodes)} decode rows in one step, at most {MAX_DECODE_ROWS}")
    skipped = () if exact else (1,)
    tile = _prompt_tile(counts, skipped, pool, num_heads, exact)
    tiles = _tiles(counts, context_lens, tile.rows // (num_heads // pool.shape[3]), skipped)
    num_splits = decode_splits((context_lens[row] for row in decodes), window, pool.shape[3]) if decodes else 0

    def put(values: list[Any], *shape: int) -> Tensor:
        """From pinned memory: a copy from any other waits for the stream."""
        numbers = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda").view(shape)
        return numbers.to(device, non_blocking=True)

    plan = AttentionPlan(
        query_starts=put(query_starts, -1),
        context_lens=put(context_lens, -1),
        block_tables=block_tables.to(device, torch.int32, non_blocking=True),
        slots=slots.to(device, non_blocking=True),
        token_rows=torch.arange(query_starts[-1], dtype=torch.int32, device=device),
        tiles=put(tiles, -1, 2),
        decode_rows=put(decodes, -1),
        split_starts=torch.empty(len(decodes) + 1, dtype=torch.int32, device=device),
        splits=torch.empty(num_splits, 4, dtype=torch.int32, device=device),
        partials=torch.empty(num_splits, num_heads, head_dim, dtype=torch.float32, device=device),
        peaks=torch.empty(num_splits, num_heads, 2, dtype=torch.float32, device=device),
        window=window,
        tile=tile,
    )
    if decodes:
        count_splits(plan, pool.shape[3])
    return plan


def plan_decode(
    pool: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    max_splits: int,
    window: int | None = None,
    exact: bool = False,
) -> AttentionPlan:
    """See kernels.ops.attention. Every shape follows from the arguments' shapes, so a CUDA graph can hold it all."""
    rows = context_lens.shape[0]
    if slots.shape != (rows,):
        raise ValueError(f"{rows} contexts, slots {list(slots.shape)}")
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=pool.device)
    tiles = torch.empty(0, 2, dtype=torch.int32, device=pool.device)
    decodes = numbers[:-1]
    if exact:
        tiles, decodes, max_splits = torch.stack((decodes, torch.zeros_like(decodes)), dim=1), decodes[:0], 0
        # padding rows, which are the last ones, have no query
        numbers = F.pad((context_lens > 0).cumsum(0, dtype=torch.int32), (1, 0))
    plan = plan_mixed(
        pool, numbers, context_lens, block_tables, slots, tiles, decodes,
        num_heads=num_heads, max_splits=max_splits, window=window,
    )  # fmt: skip
    return replace(plan, tile=_prompt_tile([1] * rows, (), pool, num_heads, exact=True)) if exact else plan


def plan_mixed(
    pool: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    slots: Tensor,
    tiles: Tensor,
    decode_rows: Tensor,
    *,
    num_heads: int,
    max_splits: int,
    window: int | None = None,
) -> AttentionPlan:
    """See kernels.ops.attention. Every shape follows from the arguments' shapes, so a CUDA graph can hold it all."""
    device, rows, num_decodes = pool.device, context_lens.shape[0], decode_rows.shape[0]
    if num_decodes > MAX_DECODE_ROWS:
        raise ValueError(f"{num_decodes} decode rows in one step, at most {MAX_DECODE_ROWS}")
    if block_tables.shape[0] != rows or query_starts.shape != (rows + 1,) or block_tables.stride(1) != 1:
        raise ValueError(f"{rows} contexts, tables {list(block_tables.shape)}, starts {list(query_starts.shape)}")
    numbers = (query_starts, context_lens, block_tables, tiles, decode_rows)
    if slots.dtype != torch.int64 or any(each.dtype != torch.int32 for each in numbers):
        raise ValueError("contexts, tables and all numbers of rows must be int32, slots int64")
    plan = AttentionPlan(
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=block_tables,
        slots=slots,
        token_rows=torch.arange(slots.shape[0], dtype=torch.int32, device=device),
        tiles=tiles,
        decode_rows=decode_rows,
        split_starts=torch.empty(num_decodes + 1, dtype=torch.int32, device=device),
        splits=torch.empty(max_splits, 4, dtype=torch.int32, device=device),
        partials=torch.empty(max_splits, num_heads, pool.shape[5], dtype=torch.float32, device=device),
        peaks=torch.empty(max_splits, num_heads, 2, dtype=torch.float32, device=device),
        window=window,
        tile=_small_tile(pool),
        padded=tiles.shape[0] > 0,
    )
    if num_decodes:
        count_splits(plan, pool.shape[3])
    return plan


def mixed_tiles(pool: Tensor, counts: list[int], context_lens: list[int], num_heads: int) -> list[tuple[int, int]]:
    """See kernels.ops.attention."""
    return _tiles(counts, context_lens, _small_tile(pool).rows // (num_heads // pool.shape[3]), (1,))


def decode_splits(context_lens: Iterable[int], window: int | None, num_kv_heads: int) -> int:
    """See kernels.ops.attention. What `_count_splits_kernel` counts."""
    columns, spans = DECODE.columns, np.fromiter(context_lens, np.int64)
    if window is not None:
        spans = spans - np.maximum(spans - window, 0) // columns * columns
    size = min(max(cdiv(int(spans.sum()) * num_kv_heads, SPLIT_PROGRAMS), LEAST_SPLIT), MOST_SPLIT)
    pieces = np.maximum((spans + size // 2) // size, 1)
    lengths = np.maximum(((spans + pieces - 1) // pieces + columns - 1) // columns * columns, columns)
    return int(np.maximum((spans + lengths - 1) // lengths, 1).sum())


def most_decode_splits(rows: int, max_context: int, window: int | None, num_kv_heads: int) -> int:
    """See kernels.ops.attention. A row has at least one split, and half of one more than its span holds."""
    span = max_context if window is None else min(max_context, window + DECODE.columns)
    by_size = max(cdiv(SPLIT_PROGRAMS, num_kv_heads), cdiv(rows * span, MOST_SPLIT))
    return rows + min(by_size, cdiv(rows * span, LEAST_SPLIT))


def count_splits(plan: AttentionPlan, num_kv_heads: int) -> None:
    """Fill `split_starts` and `splits` from the context lengths on the device; once a step, before any layer."""
    launch(
        _count_splits_kernel,
        (1,),
        {
            "context_lens": plan.context_lens,
            "decode_rows": plan.decode_rows,
            "split_starts": plan.split_starts,
            "splits": plan.splits,
            "num_rows": plan.decode_rows.shape[0],
        },
        {
            "window": plan.window or 0,
            "columns": DECODE.columns,
            "kv_heads": num_kv_heads,
            "programs": SPLIT_PROGRAMS,
            "least": LEAST_SPLIT,
            "most": MOST_SPLIT,
            "block": MAX_DECODE_ROWS,
        },
    )


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
    """See kernels.ops.attention. `q` [tokens, num_heads, head_dim] may be a view into a merged projection."""
    _check(q, pool, layer_id, alibi_slopes, sinks)
    make = torch.zeros if plan.padded else torch.empty
    out = make(q.shape, dtype=q.dtype, device=q.device)
    arguments = {
        "q": q,
        "pages": pool[:, layer_id],
        "out": out,
        "query_starts": plan.query_starts,
        "context_lens": plan.context_lens,
        "block_tables": plan.block_tables,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "table_stride": plan.block_tables.stride(0),
        "scale": scale,
        "soft_cap": soft_cap,
    }
    constants = _constants(q, pool, plan, soft_cap)
    if plan.tiles.shape[0]:
        _prefill(arguments, constants, plan)
    if plan.decode_rows.shape[0]:
        _decode(arguments, constants, plan)
    return out


def _prefill(arguments: dict[str, Any], constants: dict[str, Any], plan: AttentionPlan) -> None:
    tile = plan.tile
    launch(
        _prefill_kernel,
        (constants["kv_heads"], plan.tiles.shape[0]),  # those with most to read begin first, of all heads
        {**arguments, "tiles": plan.tiles},
        {
            **constants,
            "tile_queries": tile.rows // constants["group"],
            "rows": tile.rows,
            "columns": tile.columns,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        fp_fusion=True,
    )


def _decode(arguments: dict[str, Any], constants: dict[str, Any], plan: AttentionPlan) -> None:
    group, num_rows, num_splits = next_power_of_2(constants["group"]), plan.decode_rows.shape[0], plan.splits.shape[0]
    registers = DECODE_REGISTERS if constants["dim_block"] <= 128 else WIDE_DECODE_REGISTERS
    launch(
        _decode_kernel,
        (min(num_splits * constants["kv_heads"], PROGRAMS),),
        {
            **arguments,
            "split_starts": plan.split_starts,
            "splits": plan.splits,
            "partials": plan.partials,
            "peaks": plan.peaks,
            "num_rows": num_rows,
        },
        {**constants, "rows": max(DECODE.rows, group), "columns": DECODE.columns},
        num_warps=DECODE.warps,
        num_stages=DECODE.stages,
        fp_fusion=True,
        max_registers=registers if group <= DECODE.rows else None,
    )
    if num_splits == num_rows:
        return  # each row is one split
    launch(
        _merge_kernel,
        (num_rows, arguments["q"].shape[1]),
        {
            "split_starts": plan.split_starts,
            "partials": plan.partials,
            "peaks": plan.peaks,
            "out": arguments["out"],
            "query_starts": plan.query_starts,
            "decode_rows": plan.decode_rows,
            "sinks": arguments["sinks"],
        },
        {
            "heads": arguments["q"].shape[1],
            "head_dim": constants["head_dim"],
            "dim_block": constants["dim_block"],
            "merged": MERGED,
        },
        num_warps=2,
    )


def _constants(q: Tensor, pool: Tensor, plan: AttentionPlan, soft_cap: float) -> dict[str, Any]:
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    return {
        "kv_heads": num_kv_heads,
        "group": q.shape[1] // num_kv_heads,
        "head_dim": head_dim,
        "dim_block": max(16, next_power_of_2(head_dim)),
        "block_size": block_size,
        "page_stride": pool.stride(0),
        "kv_stride": pool.stride(2),
        "q_stride": q.stride(0),
        "window": plan.window or 0,
        "capped": soft_cap > 0,
    }


def _check(q: Tensor, pool: Tensor, layer_id: int, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    _, num_layers, _, num_kv_heads, _, head_dim = pool.shape
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ValueError(f"q {list(q.shape)} does not fit pages of {num_kv_heads} KV heads of {head_dim}")
    if q.stride()[1:] != (head_dim, 1):
        raise ValueError(f"the heads of a token must lie side by side; strides of q are {q.stride()}")
    if q.dtype != pool.dtype:
        raise ValueError(f"q is {q.dtype}, the pages are {pool.dtype}")
    if not 0 <= layer_id < num_layers:
        raise ValueError(f"layer {layer_id} of {num_layers}")
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None and (per_head.shape != (q.shape[1],) or per_head.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 [{q.shape[1]}], not {per_head.dtype} {list(per_head.shape)}")


def _prompt_tile(counts: list[int], skipped: tuple[int, ...], pool: Tensor, num_heads: int, exact: bool) -> Tile:
    """The tile of a step's prompt chunks of `counts` tokens; of an exact step always the same. Raises ValueError."""
    num_kv_heads = pool.shape[3]
    group, tile = num_heads // num_kv_heads, _small_tile(pool, exact)
    if tile is PROMPT and group <= LARGE_PROMPT.rows:
        queries = LARGE_PROMPT.rows // group
        num_large = sum(-(-count // queries) for count in counts if count not in skipped)
        if num_large * num_kv_heads >= LARGE_PROMPT_PROGRAMS:
            tile = LARGE_PROMPT
    if exact and group > tile.rows:
        tile = _small_tile(pool)
    if group > tile.rows:
        raise ValueError(f"{group} query heads per KV head, at most {tile.rows}")
    return tile


def _small_tile(pool: Tensor, exact: bool = False) -> Tile:
    wide, old = pool.shape[5] * pool.element_size() > 256, not 90 <= capability(pool.device) < 120
    if exact and pool.dtype == torch.float32:
        return FLOAT32_EXACT_PROMPT
    if exact:
        return WIDE_EXACT_PROMPT if wide else OLD_EXACT_PROMPT if old else EXACT_PROMPT
    if wide:
        return OLD_WIDE_PROMPT if old else WIDE_PROMPT
    return OLD_PROMPT if old else PROMPT


def _tiles(counts: list[int], context_lens: list[int], queries: int, skipped: tuple[int, ...]) -> list[tuple[int, int]]:
    """(row, first query) of each tile, those with most to read first, so that none begins late and ends last."""
    tiles = [
        (row, first) for row, count in enumerate(counts) if count not in skipped for first in range(0, count, queries)
    ]
    return sorted(tiles, key=lambda tile: counts[tile[0]] - context_lens[tile[0]] - tile[1])


@triton.jit(do_not_specialize=["num_rows"])
def _count_splits_kernel(
    context_lens, decode_rows, split_starts, splits, num_rows,
    window: tl.constexpr, columns: tl.constexpr, kv_heads: tl.constexpr, programs: tl.constexpr,
    least: tl.constexpr, most: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, block)
    inside = index < num_rows
    rows = tl.load(decode_rows + index, mask=inside, other=0)
    context = tl.load(context_lens + rows, mask=inside, other=0)
    first = tl.zeros([block], tl.int32)
    if window > 0:
        first = tl.maximum(context - window, 0) // columns * columns
    span = context - first
    total = tl.sum(span.to(tl.int64), axis=0)
    size = tl.minimum(tl.maximum((total * kv_heads + programs - 1) // programs, least), most).to(tl.int32)
    pieces = tl.maximum((span + size // 2) // size, 1)
    length = tl.maximum(((span + pieces - 1) // pieces + columns - 1) // columns * columns, columns)
    counts = tl.where(inside, tl.maximum((span + length - 1) // length, 1), 0)
    tl.store(split_starts, 0)
    ends = tl.cumsum(counts, axis=0)
    tl.store(split_starts + 1 + index, ends, mask=inside)
    for i in range(tl.max(counts, axis=0)):
        place = 4 * (ends - counts + i)
        begin = first + i * length
        tl.store(splits + place, rows, mask=i < counts)
        tl.store(splits + place + 1, begin, mask=i < counts)
        tl.store(splits + place + 2, tl.minimum(begin + length, context), mask=i < counts)
        tl.store(splits + place + 3, (counts == 1).to(tl.int32), mask=i < counts)


@triton.jit
def _load_queries(q, token, head, valid, q_stride: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr):
    """[rows, dim_block] of `head` at `token`, zeros where not valid."""
    dims = tl.arange(0, dim_block)
    offsets = token.to(tl.int64)[:, None] * q_stride + head[:, None] * head_dim + dims[None, :]
    return tl.load(q + offsets, mask=valid[:, None] & (dims < head_dim)[None, :], other=0.0)


@triton.jit
def _attend_tile(
    total, peak, weight, queries, slopes, query_position, pages, table, head, start, floor, limit, scale,
    soft_cap,
    head_dim: tl.constexpr, dim_block: tl.constexpr, block_size: tl.constexpr, page_stride: tl.constexpr,
    kv_stride: tl.constexpr, window: tl.constexpr, capped: tl.constexpr, columns: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """One tile of K and V, positions [start, start + columns) in [floor, limit), into the running sums of each row."""
    positions = start + tl.arange(0, columns)
    dims = tl.arange(0, dim_block)
    present = (positions >= floor) & (positions < limit)
    if masked:
        blocks = tl.load(table + positions // block_size, mask=present, other=0).to(tl.int64)
    else:
        blocks = tl.load(table + positions // block_size).to(tl.int64)
    lines = blocks * page_stride + head * (block_size * head_dim) + (positions % block_size) * head_dim
    kept = present[:, None] & (dims < head_dim)[None, :]
    if masked or dim_block != head_dim:
        keys = tl.load(pages + lines[:, None] + dims[None, :], mask=kept, other=0.0)
    else:
        keys = tl.load(pages + lines[:, None] + dims[None, :])
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    factor = scale * LOG2_E  # what makes base-2 scores: applied beside the peak, in one rounding, masked or not
    if capped:
        scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2_E * scale / soft_cap)))
        factor = soft_cap * LOG2_E
    if slopes is not None:
        distances = (positions[None, :] - query_position[:, None]).to(tl.float32)
        scores = scores * factor + (slopes * LOG2_E)[:, None] * distances
        factor = 1.0
    if masked:
        seen = present[None, :] & (positions[None, :] <= query_position[:, None])
        if window > 0:
            seen = seen & (positions[None, :] > query_position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1) * factor)
    safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores * factor - safe[:, None])
    shrink = tl.exp2(peak - safe)
    if masked or dim_block != head_dim:
        values = tl.load(pages + kv_stride + lines[:, None] + dims[None, :], mask=kept, other=0.0)
    else:
        values = tl.load(pages + kv_stride + lines[:, None] + dims[None, :])
    weight = weight * shrink + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(values.dtype), values, total * shrink[:, None], input_precision="ieee")
    return total, higher, weight


@triton.jit
def _with_sink(peak, weight, sinks, head, valid):
    """(factor of the sums, weight): a sink takes its share of the softmax and gives nothing."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=valid, other=0.0) * LOG2_E
        higher = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - higher)
        return shrink, weight * shrink + tl.exp2(sink - higher)
    return tl.full(peak.shape, 1.0, tl.float32), weight


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q, pages, out, query_starts, context_lens, block_tables, alibi_slopes, sinks, tiles, table_stride, scale, soft_cap,
    kv_heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr,
    block_size: tl.constexpr, page_stride: tl.constexpr, kv_stride: tl.constexpr, q_stride: tl.constexpr,
    window: tl.constexpr, capped: tl.constexpr, tile_queries: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    row = tl.load(tiles + 2 * tl.program_id(1))
    first_query = tl.load(tiles + 2 * tl.program_id(1) + 1)
    start = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - start
    context = tl.load(context_lens + row)
    folded = tl.arange(0, rows)
    query = first_query + folded // group
    head = kv_head * group + folded % group
    valid = (folded < tile_queries * group) & (query < num_queries)
    position = context - num_queries + query
    queries = _load_queries(q, start + query, head, valid, q_stride, head_dim, dim_block)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head, mask=valid, other=0.0)
    table = block_tables + row.to(tl.int64) * table_stride

    total = tl.zeros([rows, dim_block], tl.float32)
    peak = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    first_position = context - num_queries + first_query
    limit = tl.minimum(first_position + tile_queries, context)
    floor = 0
    begin = 0
    full = (first_position + 1) // columns * columns
    if window > 0:
        floor = tl.maximum(first_position + 1 - window, 0)
        begin = floor // columns * columns
        full = begin
    for tile in range(begin, full, columns):
        total, peak, weight = _attend_tile(
            total, peak, weight, queries, slopes, position, pages, table, kv_head, tile, floor, limit, scale,
            soft_cap,
            head_dim, dim_block, block_size, page_stride, kv_stride, window, capped, columns, False,
        )  # fmt: skip
    for tile in range(full, limit, columns):
        total, peak, weight = _attend_tile(
            total, peak, weight, queries, slopes, position, pages, table, kv_head, tile, floor, limit, scale,
            soft_cap,
            head_dim, dim_block, block_size, page_stride, kv_stride, window, capped, columns, True,
        )  # fmt: skip
    shrink, weight = _with_sink(peak, weight, sinks, head, valid)
    dims = tl.arange(0, dim_block)
    offsets = (start + query).to(tl.int64)[:, None] * (kv_heads * group * head_dim) + head[:, None] * head_dim
    answer = total * (shrink / tl.where(valid, weight, 1.0))[:, None]
    kept = valid[:, None] & (dims < head_dim)[None, :]
    tl.store(out + offsets + dims[None, :], answer.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def _decode_kernel(
    q, pages, out, query_starts, context_lens, block_tables, alibi_slopes, sinks, split_starts,
    splits, partials, peaks, table_stride, num_rows, scale, soft_cap,
    kv_heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr,
    block_size: tl.constexpr, page_stride: tl.constexpr, kv_stride: tl.constexpr, q_stride: tl.constexpr,
    window: tl.constexpr, capped: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    folded = tl.arange(0, rows)
    dims = tl.arange(0, dim_block)
    valid = folded < group
    for work in range(tl.program_id(0), tl.load(split_starts + num_rows) * kv_heads, tl.num_programs(0)):
        kv_head = work % kv_heads
        split_id = work // kv_heads
        row = tl.load(splits + 4 * split_id)
        begin = tl.multiple_of(tl.load(splits + 4 * split_id + 1), columns)
        limit = tl.load(splits + 4 * split_id + 2)
        is_whole = tl.load(splits + 4 * split_id + 3)
        context = tl.load(context_lens + row)
        head = kv_head * group + folded
        token = tl.load(query_starts + row)
        queries = _load_queries(q, token + tl.zeros([rows], tl.int32), head, valid, q_stride, head_dim, dim_block)
        slopes = None
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + head, mask=valid, other=0.0)
        position = context - 1 + tl.zeros([rows], tl.int32)
        table = block_tables + row.to(tl.int64) * table_stride
        total = tl.zeros([rows, dim_block], tl.float32)
        peak = tl.full([rows], float("-inf"), tl.float32)
        weight = tl.zeros([rows], tl.float32)
        floor = 0
        full = limit // columns * columns
        if window > 0:
            floor = tl.maximum(context - window, 0)
            full = begin
        for tile in range(begin, full, columns):
            total, peak, weight = _attend_tile(
                total, peak, weight, queries, slopes, position, pages, table, kv_head, tile, floor, limit, scale,
                soft_cap,
                head_dim, dim_block, block_size, page_stride, kv_stride, window, capped, columns, False,
            )  # fmt: skip
        for tile in range(full, limit, columns):
            total, peak, weight = _attend_tile(
                total, peak, weight, queries, slopes, position, pages, table, kv_head, tile, floor, limit, scale,
                soft_cap,
                head_dim, dim_block, block_size, page_stride, kv_stride, window, capped, columns, True,
            )  # fmt: skip
        if is_whole:
            _finish(total, peak, weight, out, sinks, token, head, valid, kv_heads * group, head_dim, dim_block)
        else:
            place = split_id.to(tl.int64) * (kv_heads * group) + head
            kept = valid[:, None] & (dims < head_dim)[None, :]
            tl.store(partials + place[:, None] * head_dim + dims[None, :], total, mask=kept)
            tl.store(peaks + 2 * place, peak, mask=valid)
            tl.store(peaks + 2 * place + 1, weight, mask=valid)


@triton.jit
def _merge_kernel(
    split_starts, partials, peaks, out, query_starts, decode_rows, sinks,
    heads: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr, merged: tl.constexpr,
):  # fmt: skip
    """Adds the splits of a row in their order, `merged` at a time, for one head."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    first_split, end = tl.load(split_starts + index), tl.load(split_starts + index + 1)
    if end - first_split > 1:
        token = tl.load(query_starts + tl.load(decode_rows + index)).to(tl.int64)
        dims = tl.arange(0, dim_block)
        inside = dims < head_dim
        total = tl.zeros([dim_block], tl.float32)
        peak = tl.full([1], float("-inf"), tl.float32)
        weight = tl.zeros([1], tl.float32)
        for first in range(first_split, end, merged):
            split_id = first + tl.arange(0, merged)
            place = split_id.to(tl.int64) * heads + head
            other_peaks = tl.load(peaks + 2 * place, mask=split_id < end, other=float("-inf"))
            other_weights = tl.load(peaks + 2 * place + 1, mask=split_id < end, other=0.0)
            kept = (split_id < end)[:, None] & inside[None, :]
            others = tl.load(partials + place[:, None] * head_dim + dims[None, :], mask=kept, other=0.0)
            higher = tl.maximum(peak, tl.max(other_peaks, axis=0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(peak - safe)
            factors = tl.exp2(other_peaks - safe)
            total = total * shrink + tl.sum(others * factors[:, None], axis=0)
            weight = weight * shrink + tl.sum(other_weights * factors, axis=0)
            peak = higher
        shrink, weight = _with_sink(peak, weight, sinks, head + tl.zeros([1], tl.int32), peak == peak)
        answer = total * (shrink / weight)
        tl.store(out + (token * heads + head) * head_dim + dims, answer.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    total, peak, weight, out, sinks, token, head, valid,
    heads: tl.constexpr, head_dim: tl.constexpr, dim_block: tl.constexpr,
):  # fmt: skip
    """Stores the answers of a token's heads."""
    dims = tl.arange(0, dim_block)
    shrink, weight = _with_sink(peak, weight, sinks, head, valid)
    answer = total * (shrink / tl.where(weight > 0, weight, 1.0))[:, None]  # a padding row has seen nothing: zeros
    place = token.to(tl.int64) * heads + head
    kept = valid[:, None] & (dims < head_dim)[None, :]
    tl.store(out + place[:, None] * head_dim + dims[None, :], answer.to(out.dtype.element_ty), mask=kept)
