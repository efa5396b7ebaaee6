"""Rotary position embedding (Su et al., 2021) in the half layout of Hugging Face."""

import torch
from torch import Tensor


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ← x * cos + rotate(x) * sin, rotate(x) = [-x₂, x₁] with x₁, x₂ the two halves of each head."""
    first, second = heads.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return heads.copy_(heads.float() * cos.float()[:, None] + rotated * sin.float()[:, None])
