"""Rotary position embedding (Su et al., 2021) in the half layout of Hugging Face."""

from torch import Tensor

from kernels.cpu import rope as cpu
from kernels.reference import rope as reference


def apply_rope_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x ← x * cos + [-x₂, x₁] * sin, with x₁, x₂ the halves of each head; writes into `heads` and returns it.

    `heads` is [tokens, heads, head_dim], a view into a larger projection will do; `cos` and `sin` are
    [tokens, head_dim] in its dtype, both halves alike, already gathered by position and scaled. A token's result
    depends on that token alone, to the bit.
    """
    return (cpu if heads.device.type == "cpu" else reference).apply_rope_(heads, cos, sin)
