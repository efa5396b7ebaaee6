"""Attention over a paged cache, for prompt chunks and decode rows in one call.

The pool is one tensor [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous. A step consists
of rows; row r owns tokens `query_starts[r]:query_starts[r + 1]`, its last token at position `context_lens[r] - 1`.
Position p of row r lives in block `block_tables[r, p // block_size]` at slot `p % block_size`; entries of the table
beyond the context are never read. Rows may share blocks: call `rotate_and_write` for all tokens of a layer before
`paged_attention` of that layer. What unused slots hold has no influence as long as it is finite, for a weight of zero
times NaN is NaN; so it never writes anything else, and one sequence's overflow cannot reach the next owner of
its blocks. The same goes for blocks that end before the window of a row's first token: they may be anybody's.

With `exact`, a token's result has the same bits however its sequence was cut into chunks and whatever the other rows
are: scores and products are computed on whole tiles of 128 absolute positions and 16 rows, masked to zero.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from kernels.cpu import attention as cpu
from kernels.ops import choice
from kernels.ops.rope import rope_and_write_kv

if TYPE_CHECKING:
    from kernels.fused import attention as fused

AttentionPlan: TypeAlias = "cpu.AttentionPlan | fused.AttentionPlan"


def _body(pool: Tensor) -> Any:
    if not choice.is_fused(pool):
        return cpu
    from kernels.fused import attention as fused

    return fused


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
    """What all layers of a step share: gather indices, groups, masks. Good for this step only.

    `block_tables` is [rows, max_blocks] int32; `slots` [tokens] int64, block_id * block_size + offset; `window` is
    the number of positions that a token sees, itself included (None: all). The pool is looked at for its shape.
    """
    return _body(pool).plan_attention(
        pool, query_starts, context_lens, block_tables, slots, num_heads=num_heads, window=window, exact=exact
    )


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
    """The plan of a step of one token per row, all of whose numbers lie on the device: a CUDA graph can hold it, and
    the numbers may change between its replays. Kernels of a GPU only.

    `context_lens` int32 [rows], the row's own token included; `block_tables` int32 [rows, max_blocks]; `slots` int64
    [rows]. A row of context 0 is padding: its slot is below 0, and its result is zeros. `max_splits` is the room for
    work: at least `decode_splits` of every step's contexts, which is not checked on the device. Of `exact` steps it is
    not looked at, and padding rows stand behind all others.
    """
    from kernels.fused import attention as fused

    return fused.plan_decode(
        pool, context_lens, block_tables, slots,
        num_heads=num_heads, max_splits=max_splits, window=window, exact=exact,
    )  # fmt: skip


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
    """The same for a step of prompt chunks and decode rows. Kernels of a GPU only.

    `query_starts` int32 [rows + 1] and `context_lens` int32 [rows] as in `plan_attention`; `tiles` int32 [n, 2] are the
    `mixed_tiles` of its rows of several tokens, `decode_rows` int32 [m] its rows of one. The last row is padding, which
    begins at a token that nobody reads and has context 0: tiles and decode rows beyond the step's own name it.
    """
    from kernels.fused import attention as fused

    return fused.plan_mixed(
        pool, query_starts, context_lens, block_tables, slots, tiles, decode_rows,
        num_heads=num_heads, max_splits=max_splits, window=window,
    )  # fmt: skip


def mixed_tiles(pool: Tensor, counts: list[int], context_lens: list[int], num_heads: int) -> list[tuple[int, int]]:
    """(row, first query) of each piece of work that the rows of several tokens are cut into."""
    from kernels.fused import attention as fused

    return fused.mixed_tiles(pool, counts, context_lens, num_heads)


def decode_splits(context_lens: Iterable[int], window: int | None, num_kv_heads: int) -> int:
    """Into how many pieces of work the decode rows of a step of such contexts are cut."""
    from kernels.fused import attention as fused

    return fused.decode_splits(context_lens, window, num_kv_heads)


def most_decode_splits(rows: int, max_context: int, window: int | None, num_kv_heads: int) -> int:
    """The most that `rows` decode rows of up to `max_context` tokens are cut into."""
    from kernels.fused import attention as fused

    return fused.most_decode_splits(rows, max_context, window, num_kv_heads)


def most_decode_rows() -> int:
    """The most rows of one token that a step may have, unless it is exact. Of kernels of a GPU."""
    from kernels.fused import attention as fused

    return fused.MAX_DECODE_ROWS


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
    """All between a layer's merged projection and its attention: norms of q and k, rope, K and V into their pages.

    `heads` is [tokens, num_heads + 2 * num_kv_heads, head_dim] and is overwritten; `cos` and `sin` are [tokens,
    rotary_dim], gathered by position, or None: no rope. The flags are those of kernels.ops.rope. Returns q [tokens,
    num_heads, head_dim]. What is not finite is written as zero.
    """
    if isinstance(plan, cpu.AttentionPlan):
        return cpu.rotate_and_write(
            heads, pool, layer_id, plan, cos, sin,
            interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, plus_one=plus_one, exact=exact,
        )  # fmt: skip
    return rope_and_write_kv(
        heads, pool, layer_id, plan.slots, None if cos is None else plan.token_rows, cos, sin,
        interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, plus_one=plus_one,
    )  # fmt: skip


def write_kv(kv: Tensor, pool: Tensor, layer_id: int, plan: AttentionPlan) -> None:
    """Write K and V, `kv` being [tokens, 2, num_kv_heads, head_dim], into the pages of `layer_id`.

    `kv` may be a strided view. NaNs and infinities are written as zeros.
    """
    if isinstance(plan, cpu.AttentionPlan):
        cpu.write_kv(kv, pool, layer_id, plan)
    else:
        rope_and_write_kv(kv.flatten(1, 2), pool, layer_id, plan.slots)


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
    """softmax(s) · V for each query over what it may see; q and result [tokens, num_heads, head_dim].

    s = q · Kᵀ * scale; with a soft cap c (Gemma 2) c * tanh(s / c); plus slope * (key's - query's position) of each
    head (ALiBi, Press et al., 2021). A sink (gpt-oss) is one more score per head, whose share of the softmax is lost.
    `alibi_slopes` and `sinks` are float32 [num_heads].
    """
    return _body(pool).paged_attention(
        q, pool, layer_id, plan, scale, soft_cap=soft_cap, alibi_slopes=alibi_slopes, sinks=sinks
    )
