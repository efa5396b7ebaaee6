"""Activations of feed-forward layers, plain or as the gate of another half (Shazeer, 2020); in float32."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] the two halves of the last dimension."""
    return activate_and_mul(gate_up, "silu", exact=exact)


def activate_and_mul(gate_up: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    """y = act(g) * u with [g, u] the two halves of the last dimension."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (FUNCTIONS[kind](gate) * up).to(gate_up.dtype)


def activate(x: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    """y = act(x)."""
    return FUNCTIONS[kind](x.float()).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) * torch.relu(x),
}
