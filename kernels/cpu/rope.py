"""Rotary embedding in place, in four operations that each round once.

A fused multiply-add would save one, but rounds a vector's tail unlike its body, so a token's bits would depend on
the number of tokens; writing in place is what lets K and V leave for their pages together.
"""

import torch
from torch import Tensor


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    crossed = torch.mul(heads, sin[:, None])
    heads.mul_(cos[:, None])
    heads[..., :half].sub_(crossed[..., half:])
    heads[..., half:].add_(crossed[..., :half])
    return heads
