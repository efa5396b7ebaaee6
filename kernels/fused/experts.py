"""Mixture-of-experts layers: routing, then four launches whose grids follow from the number of tokens alone.

1. `_sort_kernel` (a program per expert): the assignments (token, choice) in the order of their experts, stable, and the
   tiles of the products: each belongs to one expert, and there are never more than `_max_tiles`.
2. `_product_kernel`, gated: the rows of a tile are gathered, and the gated product is left in sorted order.
3. `_product_kernel`: the down projection, weighted by the routing, is scattered to its assignment.
4. `_combine_kernel`: a token's experts are summed in its own order.

Nothing is added atomically. A row of a product depends on its own values and the tile's configuration alone, so an
exact step is one that takes the same configuration at any number of tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import capability, cdiv, launch, next_power_of_2

SORTED_AT_ONCE = 1024
TILES_AT_ONCE = tl.constexpr(64)
COMBINED = 1024
"""Columns of a program that sums a token's experts."""
ROUTED = 1024
"""Logits of a program that routes."""
SMALLEST_SUM = tl.constexpr(1e-20)
LAST = tl.constexpr(-(2**31))
STEEPNESS = tl.constexpr(1.702)
"""Of the sigmoid in the gate of gpt-oss."""
SUPPORTED = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is computed: rows and columns of a program, its steps along K. `columns` are those of gate and up
    each, and half of those of a down projection, so that both kinds have as many sums in registers."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FEW, SOME, MANY = Tile(16, 64, 128, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 8, 4)
"""By the number of tokens that an expert gets on average. FEW reads weights and little else."""
SMALL_FEW = Tile(16, 64, 128, 4, 3)
"""FEW where a program has some 100 KB of shared memory: compute capabilities 8.6, 8.9 and 12.0."""
WIDE_FEW, WIDE_SOME, WIDE_MANY = Tile(16, 64, 64, 4, 3), Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 8, 3)
"""For float32, whose products are made of single multiplications."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The weights as they came: [experts, 2 * width, hidden], the gate first, and [experts, hidden, width]; biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    clamp: float

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    @property
    def width(self) -> int:
        return self.down.shape[2]


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits, weights, expert_ids, num_tokens,
    stride: tl.constexpr, num_experts: tl.constexpr, top_k: tl.constexpr, softmax: tl.constexpr,
    renormalize: tl.constexpr, rows: tl.constexpr, experts_block: tl.constexpr, choices_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    expert, choice = tl.arange(0, experts_block)[None, :], tl.arange(0, choices_block)[None, :]
    inside = (row < num_tokens) & (expert < num_experts)
    x = tl.load(logits + row * stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if softmax:
        scores = tl.exp(x - tl.where(row < num_tokens, tl.max(x, 1, keep_dims=True), 0.0))
        scores /= tl.sum(scores, 1, keep_dims=True) + tl.where(row < num_tokens, 0.0, 1.0)
    else:
        scores = tl.sigmoid(x)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    order = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), LAST + 2)
    order = tl.where(expert < num_experts, order, LAST + 1)
    chosen = tl.zeros((rows, choices_block), tl.float32)
    ids = tl.zeros((rows, choices_block), tl.int32)
    total = tl.zeros((rows, 1), tl.float32)
    for i in range(top_k):
        best = tl.argmax(order, 1, keep_dims=True)
        score = tl.sum(tl.where(expert == best, scores, 0.0), 1, keep_dims=True)
        chosen = tl.where(choice == i, score, chosen)
        ids = tl.where(choice == i, best, ids)
        total += score
        order = tl.where(expert == best, LAST, order)
    if renormalize:
        chosen = tl.div_rn(chosen, tl.where(total < SMALLEST_SUM, SMALLEST_SUM, total) + tl.zeros_like(chosen))
    mask = (row < num_tokens) & (choice < top_k)
    tl.store(weights + row * top_k + choice, chosen, mask=mask)
    tl.store(expert_ids + row * top_k + choice, ids, mask=mask)


@triton.jit(do_not_specialize=["num_assignments"])
def _sort_kernel(
    expert_ids, order, tile_experts, tile_starts, tile_ends, num_tiles, num_assignments,
    num_experts: tl.constexpr, experts_block: tl.constexpr, tile_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    mine, expert, lane = tl.program_id(0), tl.arange(0, experts_block), tl.arange(0, block)
    counts = tl.zeros((experts_block,), tl.int32)
    for start in range(0, num_assignments, block):
        mask = start + lane < num_assignments
        ids = tl.load(expert_ids + start + lane, mask=mask, other=0)
        counts += tl.histogram(ids, experts_block, mask=mask)
    tiles = (counts + tile_rows - 1) // tile_rows
    count, my_tiles = tl.sum(tl.where(expert == mine, counts, 0), 0), tl.sum(tl.where(expert == mine, tiles, 0), 0)
    first = tl.sum(tl.where(expert < mine, counts, 0), 0)
    first_tile = tl.sum(tl.where(expert < mine, tiles, 0), 0)
    for start in range(0, my_tiles, TILES_AT_ONCE):
        tile = start + tl.arange(0, TILES_AT_ONCE)
        at = first_tile + tile
        tl.store(tile_experts + at, tl.zeros_like(tile) + mine, mask=tile < my_tiles)
        tl.store(tile_starts + at, first + tile * tile_rows, mask=tile < my_tiles)
        tl.store(tile_ends + at, tl.zeros_like(tile) + first + count, mask=tile < my_tiles)
    if mine == num_experts - 1:
        tl.store(num_tiles, first_tile + my_tiles)
    for start in range(0, num_assignments, block):
        inside = tl.load(expert_ids + start + lane, mask=start + lane < num_assignments, other=-1) == mine
        place = first + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(order + place, start + lane, mask=inside)
        first += tl.sum(inside.to(tl.int32), 0)


@triton.jit
def _product_kernel(
    x, weight, bias, routing, out, order, tile_experts, tile_starts, tile_ends, num_tiles,
    depth: tl.constexpr, width: tl.constexpr, top_k: tl.constexpr, gated: tl.constexpr, clamp: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
):  # fmt: skip
    """Gated: rows of x by token, [assignments, width] in sorted order; else: rows in sorted order, by assignment."""
    tile = tl.program_id(0)
    if tile < tl.load(num_tiles):
        expert = tl.load(tile_experts + tile).to(tl.int64)
        place = tl.load(tile_starts + tile) + tl.arange(0, tile_rows)
        valid = place < tl.load(tile_ends + tile)
        assignment = tl.load(order + place, mask=valid, other=0)
        row = (assignment // top_k if gated else place).to(tl.int64)
        column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
        step = tl.arange(0, tile_depth)
        x_at = x + row[:, None] * depth + step[None, :]
        weight_at = weight + (expert * (2 * width if gated else width) + column)[:, None] * depth + step[None, :]
        fits: tl.constexpr = depth % tile_depth == 0
        total = tl.zeros((tile_rows, tile_columns), tl.float32)
        up_total = total
        for start in range(0, depth, tile_depth):
            inside = step[None, :] < (tile_depth if fits else depth - start)
            values = tl.load(x_at + start, mask=valid[:, None] & inside, other=0.0)
            mask = (column < width)[:, None] & inside
            factors = tl.load(weight_at + start, mask=mask, other=0.0)
            total = tl.dot(values, tl.trans(factors), total, input_precision="ieee")
            if gated:
                factors = tl.load(weight_at + start + width * depth, mask=mask, other=0.0)
                up_total = tl.dot(values, tl.trans(factors), up_total, input_precision="ieee")
        if bias is not None:
            bias_at = bias + expert * (2 * width if gated else width) + column
            total += tl.load(bias_at, mask=column < width, other=0.0).to(tl.float32)[None, :]
            if gated:
                up_total += tl.load(bias_at + width, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if gated:
            if clamp > 0:  # by comparisons, for a NaN is to stay one
                total = tl.where(total > clamp, clamp, total)
                up_total = tl.where(up_total > clamp, clamp, tl.where(up_total < -clamp, -clamp, up_total))
                total = total * tl.sigmoid(total * STEEPNESS) * (up_total + 1.0)
            else:
                total = total * tl.sigmoid(total) * up_total
            at = place.to(tl.int64)
        else:
            total *= tl.load(routing + assignment, mask=valid, other=0.0)[:, None]
            at = assignment.to(tl.int64)
        mask = valid[:, None] & (column < width)[None, :]
        tl.store(out + at[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(given, out, hidden: tl.constexpr, top_k: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < hidden
    total = tl.load(given + token * top_k * hidden + column, mask=mask, other=0.0).to(tl.float32)
    for choice in tl.static_range(1, top_k):
        total += tl.load(given + (token * top_k + choice) * hidden + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=mask)


def route(
    logits: Tensor, top_k: int, *, scoring: Literal["softmax", "sigmoid"] = "softmax", renormalize: bool
) -> tuple[Tensor, Tensor]:
    """See kernels.ops.experts, here and below."""
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be [tokens, experts], rows contiguous, not {tuple(logits.shape)}")
    num_tokens, num_experts = logits.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, there are {num_experts} experts")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is softmax or sigmoid, not {scoring!r}")
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    experts_block = next_power_of_2(num_experts)
    rows = max(ROUTED // experts_block, 1)
    launch(
        _route_kernel,
        (cdiv(num_tokens, rows),),
        {"logits": logits, "weights": weights, "expert_ids": expert_ids, "num_tokens": num_tokens},
        {"stride": logits.stride(0), "num_experts": num_experts, "top_k": top_k, "softmax": scoring == "softmax"}
        | {"renormalize": renormalize, "rows": rows, "experts_block": experts_block}
        | {"choices_block": next_power_of_2(top_k)},
    )
    return weights, expert_ids


def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float = 0.0,
) -> PackedExperts:
    """Holds no copy of contiguous weights."""
    if down.ndim != 3 or down.dtype not in SUPPORTED:
        raise ValueError(f"down must be [experts, hidden, width] of floats, not {down.dtype} {tuple(down.shape)}")
    num_experts, hidden, width = down.shape
    if gate_up.shape != (num_experts, 2 * width, hidden) or gate_up.dtype != down.dtype:
        raise ValueError(f"gate_up is {gate_up.dtype} {tuple(gate_up.shape)}, down {down.dtype} {tuple(down.shape)}")
    for name, bias, size in (("gate_up_bias", gate_up_bias, 2 * width), ("down_bias", down_bias, hidden)):
        if bias is not None and (bias.shape != (num_experts, size) or not bias.is_contiguous()):
            raise ValueError(f"{name} must be [{num_experts}, {size}], contiguous, not {tuple(bias.shape)}")
    return PackedExperts(gate_up.contiguous(), down.contiguous(), gate_up_bias, down_bias, clamp)


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, exact: bool = False) -> Tensor:
    _check(x, packed, weights, expert_ids)
    num_tokens, top_k = expert_ids.shape
    tile = _tile(num_tokens * top_k, packed.num_experts, x, exact=exact)
    work = _sort(expert_ids, packed.num_experts, tile)
    activated = torch.empty((num_tokens * top_k, packed.width), dtype=x.dtype, device=x.device)
    given = torch.empty((num_tokens * top_k, packed.hidden), dtype=x.dtype, device=x.device)
    _multiply(x, packed.gate_up, packed.gate_up_bias, None, activated, work, tile, top_k, packed.clamp)
    _multiply(activated, packed.down, packed.down_bias, weights, given, work, tile, top_k)
    out = torch.empty_like(x)
    launch(
        _combine_kernel,
        (num_tokens, cdiv(packed.hidden, COMBINED)),
        {"given": given, "out": out},
        {"hidden": packed.hidden, "top_k": top_k, "block": min(COMBINED, next_power_of_2(packed.hidden))},
    )
    return out


@dataclass(frozen=True, slots=True)
class _Work:
    """Which rows a tile of a product computes, and for which expert. All int32."""

    order: Tensor
    """[assignments]: token * top_k + choice, by expert."""
    tile_experts: Tensor
    """[max_tiles], as are the next two: a tile's first place in `order`, and where its expert's places end."""
    tile_starts: Tensor
    tile_ends: Tensor
    num_tiles: Tensor
    """[1]"""


def _sort(expert_ids: Tensor, num_experts: int, tile: Tile) -> _Work:
    num_assignments = expert_ids.numel()

    def ints(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=expert_ids.device)

    tiles = _max_tiles(num_assignments, num_experts, tile.rows)
    work = _Work(ints(num_assignments), ints(tiles), ints(tiles), ints(tiles), ints(1))
    launch(
        _sort_kernel,
        (num_experts if num_assignments else 0,),
        {"expert_ids": expert_ids, "order": work.order, "num_tiles": work.num_tiles}
        | {"tile_experts": work.tile_experts, "tile_starts": work.tile_starts, "tile_ends": work.tile_ends}
        | {"num_assignments": num_assignments},
        {"num_experts": num_experts, "experts_block": max(next_power_of_2(num_experts), 32)}
        | {"tile_rows": tile.rows, "block": SORTED_AT_ONCE},
    )
    return work


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Tensor | None,
    out: Tensor,
    work: _Work,
    tile: Tile,
    top_k: int,
    clamp: float = 0.0,
) -> None:
    width = out.shape[1]
    columns = tile.columns if routing is None else 2 * tile.columns
    launch(
        _product_kernel,
        (len(work.tile_experts), cdiv(width, columns)),
        {"x": x, "weight": weight, "bias": bias, "routing": routing, "out": out}
        | {"order": work.order, "num_tiles": work.num_tiles}
        | {"tile_experts": work.tile_experts, "tile_starts": work.tile_starts, "tile_ends": work.tile_ends},
        {"depth": x.shape[1], "width": width, "top_k": top_k, "gated": routing is None, "clamp": clamp}
        | {"tile_rows": tile.rows, "tile_columns": columns, "tile_depth": tile.depth},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _max_tiles(num_assignments: int, num_experts: int, tile_rows: int) -> int:
    """Each expert that is chosen at all may leave one tile unfilled."""
    chosen = min(num_experts, num_assignments)
    return (num_assignments + chosen * (tile_rows - 1)) // tile_rows


def _tile(num_assignments: int, num_experts: int, x: Tensor, *, exact: bool) -> Tile:
    few, some, many = (WIDE_FEW, WIDE_SOME, WIDE_MANY) if x.dtype == torch.float32 else (FEW, SOME, MANY)
    if few is FEW and (capability(x.device) in (86, 89) or capability(x.device) >= 120):
        few = SMALL_FEW
    if exact:
        return some
    share = num_assignments / num_experts
    return few if share <= few.rows else some if share <= some.rows else many


def _check(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != packed.hidden or x.dtype != packed.down.dtype or not x.is_contiguous():
        raise ValueError(
            f"x must be {packed.down.dtype} [tokens, {packed.hidden}], contiguous: {x.dtype} {tuple(x.shape)}"
        )
    for name, tensor, dtype in (("weights", weights, torch.float32), ("expert_ids", expert_ids, torch.int32)):
        fits = tensor.ndim == 2 and len(tensor) == len(x) and tensor.shape == weights.shape and tensor.is_contiguous()
        if not fits or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} [{len(x)}, k], contiguous, not {tensor.dtype} {tensor.shape}")
    if not 0 < weights.shape[1] <= packed.num_experts:
        raise ValueError(f"{weights.shape[1]} choices of {packed.num_experts} experts")
