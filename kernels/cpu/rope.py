"""Rotary embedding in place, in four operations that each round once.

A fused multiply-add would save one, but rounds a vector's tail unlike its body, so a token's bits would depend on
the number of tokens; writing in place is what lets K and V leave for their pages together.
"""

import torch
from torch import Tensor


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    if interleaved:
        cos, sin = (table[:, :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
    turning = heads[..., :rotary_dim]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    crossed = torch.mul(turning, sin[:, None])
    turning.mul_(cos[:, None])
    turning[..., first].sub_(crossed[..., second])
    turning[..., second].add_(crossed[..., first])
    return heads
