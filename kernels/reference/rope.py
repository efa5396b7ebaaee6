"""Rotary position embedding (Su et al., 2021), alone and on the way of K and V into their pages; in float32."""

import torch
from torch import Tensor

from kernels.reference.norm import rms_norm


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns every head of `heads` [tokens, heads, head_dim] by its token's `cos` and `sin` [tokens, rotary_dim],
    in place and in the dtype of `heads`: 2 · heads · head_dim numbers a token are moved, and its cos and sin read."""
    return heads.copy_(_turned(heads.float(), cos, sin, interleaved))


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
    """q ← turned(norm(q)); pool[block, layer, :, :, slot] = (turned(norm(k)), v), what is not finite becoming zero.

    `qkv` is [tokens, heads + 2 * kv_heads, head_dim], `pool` [blocks, layers, 2, kv_heads, block_size, head_dim], `cos`
    and `sin` [positions, rotary_dim], `slots` and `positions` [tokens]; a token whose slot is below 0 is left out. The
    norms are RMSNorms of each head (as in Qwen3). qkv is read once; q, K and V are written once.
    """
    block_size, num_kv_heads = pool.shape[4], pool.shape[3]
    kept = slots >= 0
    wide = qkv[kept].float()
    q, k, v = wide.split((qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, plus_one=plus_one)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, plus_one=plus_one)
    if positions is not None and cos is not None and sin is not None:
        at = positions[kept].long()
        q, k = (_turned(heads, cos[at], sin[at], interleaved) for heads in (q, k))
    kv = torch.stack((k, v), dim=1).to(pool.dtype)
    slot = slots[kept].long()
    pool[slot // block_size, layer_id, :, :, slot % block_size] = torch.nan_to_num(kv, nan=0.0, posinf=0.0, neginf=0.0)
    out = qkv[:, : q.shape[1]] if out is None else out
    out[kept] = q.to(out.dtype)
    return out


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pair i of each head, (x, y), becomes (x cos - y sin, y cos + x sin) with column i of `cos` and `sin`.

    Pair i is elements i and i + rotary_dim / 2, or, interleaved, 2 i and 2 i + 1; those behind rotary_dim stay.
    """
    rotary_dim = cos.shape[-1]
    turning, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    x, y = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    c, s = cos.float()[:, None, : rotary_dim // 2], sin.float()[:, None, : rotary_dim // 2]
    turned = (x * c - y * s, y * c + x * s)
    return torch.cat((torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1), rest), -1)
