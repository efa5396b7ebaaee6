"""Rotary position embedding (Su et al., 2021): pair i of a head, (x, y), becomes (x cos - y sin, y cos + x sin).

Of a head's first `rotary_dim` elements, pair i is elements i and i + rotary_dim / 2 (Hugging Face, GPT-NeoX) or,
`interleaved`, 2 i and 2 i + 1 (GPT-J); elements behind `rotary_dim` stay. `cos` and `sin` hold pair i's in column i;
their columns from rotary_dim / 2 on repeat the first ones. A token's result depends on that token alone, to the bit.
"""

from types import ModuleType

from torch import Tensor

from kernels.cpu import rope as cpu
from kernels.ops import choice
from kernels.reference import rope as reference


def _body(qkv: Tensor) -> ModuleType:
    if not choice.is_fused(qkv):
        return reference
    from kernels.fused import rope as fused

    return fused


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns `heads` in place and returns it.

    `heads` is [tokens, heads, head_dim], a view into a larger projection will do; `cos` and `sin` are
    [tokens, rotary_dim] in its dtype, already gathered by position and scaled.
    """
    return (reference if choice.is_fused(heads) else cpu).apply_rope_(heads, cos, sin, interleaved=interleaved)


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
    """All that lies between a layer's merged projection and its attention: norms of q and k, rope, K and V to pages.

    qkv         [tokens, num_heads + 2 * num_kv_heads, head_dim], the last dimension contiguous, in the pool's dtype;
                without query heads K and V alone are written
    pool        [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], the last dimension contiguous
    slots       [tokens] int32 or int64, block * block_size + offset, none twice; below 0: a padding token
    positions   [tokens] int32 or int64, below the number of rows of the tables; None with them: no rope
    cos, sin    [positions, rotary_dim], alike in strides; any float dtype; rotary_dim is even, at most head_dim
    q_norm, k_norm   [head_dim] or None: weights of an RMSNorm of each head, before the rope, with `eps` and `plus_one`
                     as in kernels.ops.norm
    out         [tokens, num_heads, head_dim] for q; None: q is written where it lies

    Returns q. K and V of layer `layer_id` lie at their slots, NaNs and infinities as zeros. Norm and rope are computed
    in float32 and rounded once, whereas `rms_norm` and `apply_rope_` one after the other round in between. Of a padding
    token nothing is written, and its position is not looked up. What `qkv` holds of K and V afterwards is not defined.
    Raises ValueError where shapes, strides or dtypes do not fit (the fused body).
    """
    return _body(qkv).rope_and_write_kv(
        qkv, pool, layer_id, slots, positions, cos, sin,
        interleaved=interleaved, q_norm=q_norm, k_norm=k_norm, eps=eps, plus_one=plus_one, out=out,
    )  # fmt: skip
