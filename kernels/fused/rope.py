"""Everything between a layer's merged projection and its attention, in one launch: norms of q and k, rope, and K and V
into their pages.

A program takes some heads of one token: query heads, or K and V of half as many KV heads. All that it reads is asked
for at once, but for the tables, which wait for the token's position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch, next_power_of_2

TILE = 2048
"""Elements of a program."""
PER_THREAD = 16


@triton.jit
def _load_pairs(heads, mask, half: tl.constexpr, pair_block: tl.constexpr, interleaved: tl.constexpr):
    """Both members of all pairs, each [rows, pair_block] float32; `heads` [rows, 1] points to where heads begin."""
    if interleaved:
        column = tl.arange(0, 2 * pair_block)[None, :]
        both = tl.load(heads + column, mask=mask & (column < 2 * half), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], pair_block, 2)))
    else:
        column = tl.arange(0, pair_block)[None, :]
        inside = mask & (column < half)
        first = tl.load(heads + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(heads + half + column, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store(pointers, values, mask, finite: tl.constexpr):
    """Round and store; with `finite`, zeros for what is not, infinities that rounding made among it."""
    rounded = values.to(pointers.dtype.element_ty)
    if finite:
        rounded = tl.where(tl.abs(rounded.to(tl.float32)) < float("inf"), rounded, 0.0).to(rounded.dtype)
    tl.store(pointers, rounded, mask=mask)


@triton.jit
def _store_pairs(
    heads, first, second, mask, half: tl.constexpr, pair_block: tl.constexpr, interleaved: tl.constexpr,
    finite: tl.constexpr,
):  # fmt: skip
    if interleaved:
        column = tl.arange(0, 2 * pair_block)[None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * pair_block))
        _store(heads + column, both, mask & (column < 2 * half), finite)
    else:
        column = tl.arange(0, pair_block)[None, :]
        inside = mask & (column < half)
        _store(heads + column, first, inside, finite)
        _store(heads + half + column, second, inside, finite)


@triton.jit
def _move_heads(
    source, target, present, kept, cos, sin, weight, eps,
    head_dim: tl.constexpr, half: tl.constexpr, interleaved: tl.constexpr, plus_one: tl.constexpr,
    finite: tl.constexpr, pair_block: tl.constexpr, rest_block: tl.constexpr,
):  # fmt: skip
    """Heads that begin at `source` [rows, 1], where `present`, go to `target`, where `kept`, through the norm (if there
    is a weight) and the rope of their first 2 * half elements. All loads come before what waits for them."""
    column = tl.arange(0, rest_block)[None, :]
    rest_inside = column < head_dim - 2 * half
    if half > 0:
        first, second = _load_pairs(source, present, half, pair_block, interleaved)
        pair = tl.arange(0, pair_block)[None, :]
        c = tl.load(cos + pair, mask=pair < half, other=0.0).to(tl.float32)
        s = tl.load(sin + pair, mask=pair < half, other=0.0).to(tl.float32)
    if head_dim > 2 * half:
        rest = tl.load(source + 2 * half + column, mask=present & rest_inside, other=0.0).to(tl.float32)
    if weight is not None:
        one = 1.0 if plus_one else 0.0
        squares = 0.0
        if half > 0:
            weights = weight + tl.zeros((1, 1), tl.int32)
            everywhere = tl.full((1, 1), True, tl.int1)
            first_gain, second_gain = _load_pairs(weights, everywhere, half, pair_block, interleaved)
            squares += tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if head_dim > 2 * half:
            rest_gain = tl.load(weight + 2 * half + column, mask=rest_inside, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / head_dim + eps)
        if half > 0:
            first = first * scale * (first_gain + one)
            second = second * scale * (second_gain + one)
        if head_dim > 2 * half:
            rest = rest * scale * (rest_gain + one)
    if half > 0:
        _store_pairs(
            target, first * c - second * s, second * c + first * s, kept, half, pair_block, interleaved, finite
        )
    if head_dim > 2 * half:
        _store(target + 2 * half + column, rest, kept & rest_inside, finite)


@triton.jit(do_not_specialize=["layer_id"])
def _rope_and_write_kv_kernel(
    qkv, out, pool, slots, positions, cos, sin, q_norm, k_norm, layer_id, eps,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
    interleaved: tl.constexpr, plus_one: tl.constexpr, token_stride: tl.constexpr, head_stride: tl.constexpr,
    out_token_stride: tl.constexpr, out_head_stride: tl.constexpr, table_stride: tl.constexpr,
    block_size: tl.constexpr, block_stride: tl.constexpr, layer_stride: tl.constexpr, kv_stride: tl.constexpr,
    kv_head_stride: tl.constexpr, slot_stride: tl.constexpr, q_tiles: tl.constexpr, kv_tiles: tl.constexpr,
    q_rows: tl.constexpr, kv_rows: tl.constexpr, pair_block: tl.constexpr, rest_block: tl.constexpr,
    head_block: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // (q_tiles + kv_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (q_tiles + kv_tiles)
    slot = tl.load(slots + token).to(tl.int64)
    real = slot >= 0
    if half > 0:
        position = tl.where(real, tl.load(positions + token).to(tl.int64), 0)
        cos += position * table_stride
        sin += position * table_stride
    source = qkv + token * token_stride
    if tile < q_tiles:
        head = tile * q_rows + tl.arange(0, q_rows)[:, None]
        present = head < num_heads
        _move_heads(
            source + head * head_stride, out + token * out_token_stride + head * out_head_stride, present,
            present & real, cos, sin, q_norm, eps,
            head_dim, half, interleaved, plus_one, False, pair_block, rest_block,
        )  # fmt: skip
    else:
        kv_head = (tile - q_tiles) * kv_rows + tl.arange(0, kv_rows)[:, None]
        held = kv_head < num_kv_heads
        keys = source + (num_heads + kv_head) * head_stride
        page = pool + slot // block_size * block_stride + layer_id.to(tl.int64) * layer_stride
        line = page + slot % block_size * slot_stride + kv_head * kv_head_stride
        column = tl.arange(0, head_block)[None, :]
        inside = column < head_dim
        values = tl.load(keys + num_kv_heads * head_stride + column, mask=held & inside, other=0.0)
        _move_heads(
            keys, line, held, held & real, cos, sin, k_norm, eps,
            head_dim, half, interleaved, plus_one, True, pair_block, rest_block,
        )  # fmt: skip
        _store(line + kv_stride + column, values, held & real & inside, True)


def rope_and_write_kv(
    qkv: Tensor,
    pool: Tensor,
    layer_id: int,
    slots: Tensor,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """See kernels.ops.rope. float32 throughout: q and K round once, V not at all."""
    _check_heads(qkv, pool, layer_id, q_norm, k_norm, out)
    _check_tokens(qkv, slots, positions, cos, sin)
    num_tokens, _, head_dim = qkv.shape
    num_kv_heads = pool.shape[3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    q = qkv[:, :num_heads] if out is None else out
    rotary_dim = 0 if cos is None else cos.shape[1]
    moved = out is not None or rotary_dim > 0 or q_norm is not None
    tiles = _tiles(num_heads if moved else 0, num_kv_heads, head_dim, rotary_dim)
    launch(
        _rope_and_write_kv_kernel,
        (num_tokens * (tiles["q_tiles"] + tiles["kv_tiles"]),),
        {
            "qkv": qkv,
            "out": q if tiles["q_tiles"] else qkv,  # a tensor without elements lies nowhere
            "pool": pool,
            "slots": slots,
            "positions": None if cos is None else positions,
            "cos": cos,
            "sin": sin,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "layer_id": layer_id,
            "eps": eps,
        },
        {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "half": rotary_dim // 2,
            "interleaved": interleaved,
            "plus_one": plus_one,
            "token_stride": qkv.stride(0),
            "head_stride": qkv.stride(1),
            "out_token_stride": q.stride(0),
            "out_head_stride": q.stride(1),
            "table_stride": 0 if cos is None else cos.stride(0),
            "block_size": pool.shape[4],
            "block_stride": pool.stride(0),
            "layer_stride": pool.stride(1),
            "kv_stride": pool.stride(2),
            "kv_head_stride": pool.stride(3),
            "slot_stride": pool.stride(4),
            **tiles,
        },
        num_warps=min(max(max(tiles["q_rows"], 2 * tiles["kv_rows"]) * tiles["head_block"] // (PER_THREAD * 32), 1), 4),
    )
    return q


def _tiles(num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> dict[str, int]:
    """How heads are dealt out to programs, and the powers of two that hold the parts of a head."""
    head_block = next_power_of_2(head_dim)
    q_rows = min(next_power_of_2(max(num_heads, 1)), max(TILE // head_block, 1))
    kv_rows = min(next_power_of_2(num_kv_heads), max(TILE // head_block // 2, 1))
    return {
        "q_tiles": cdiv(num_heads, q_rows),
        "kv_tiles": cdiv(num_kv_heads, kv_rows),
        "q_rows": q_rows,
        "kv_rows": kv_rows,
        "pair_block": next_power_of_2(max(rotary_dim // 2, 1)),
        "rest_block": next_power_of_2(max(head_dim - rotary_dim, 1)),
        "head_block": head_block,
    }


def _check_heads(
    qkv: Tensor, pool: Tensor, layer_id: int, q_norm: Tensor | None, k_norm: Tensor | None, out: Tensor | None
) -> None:
    if pool.ndim != 6 or pool.shape[2] != 2 or pool.stride(5) != 1:
        raise ValueError(f"pool must be [blocks, layers, 2, kv_heads, block_size, head_dim], not {list(pool.shape)}")
    if not 0 <= layer_id < pool.shape[1]:
        raise ValueError(f"layer_id {layer_id} of {pool.shape[1]} layers")
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    if qkv.ndim != 3 or qkv.shape[1] < 2 * num_kv_heads or qkv.shape[2] != head_dim or qkv.stride(2) != 1:
        raise ValueError(f"qkv {list(qkv.shape)} does not hold q and {num_kv_heads} K and V heads of {head_dim}")
    if qkv.dtype != pool.dtype:
        raise ValueError(f"qkv is {qkv.dtype}, the pool {pool.dtype}")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (weight.shape != (head_dim,) or not weight.is_contiguous()):
            raise ValueError(f"{name} must be [{head_dim}], contiguous, not {list(weight.shape)}")
    expected = (qkv.shape[0], qkv.shape[1] - 2 * num_kv_heads, head_dim)
    if out is not None and (out.shape != expected or out.dtype != qkv.dtype or out.stride(2) != 1):
        raise ValueError(f"out must be {qkv.dtype} {list(expected)}, not {out.dtype} {list(out.shape)}")


def _check_tokens(qkv: Tensor, slots: Tensor, positions: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    for name, ids in (("slots", slots), ("positions", positions)):
        if ids is not None and (
            ids.shape != qkv.shape[:1] or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous()
        ):
            raise ValueError(f"{name} must be [{qkv.shape[0]}] int32 or int64, not {ids.dtype} {list(ids.shape)}")
    if (cos is None) != (sin is None) or (cos is None) != (positions is None):
        raise ValueError("positions, cos and sin are given together or not at all")
    if cos is not None and sin is not None:
        if cos.ndim != 2 or cos.shape != sin.shape or cos.stride() != sin.stride() or cos.stride(1) != 1:
            raise ValueError(f"cos {list(cos.shape)} and sin {list(sin.shape)} must be alike, [positions, rotary_dim]")
        if cos.shape[1] % 2 or not 0 < cos.shape[1] <= qkv.shape[2]:
            raise ValueError(f"rotary_dim {cos.shape[1]} must be even and at most {qkv.shape[2]}")
