"""The gate of a SwiGLU feed-forward layer (Shazeer, 2020)."""

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] the two halves of the last dimension; computed in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
