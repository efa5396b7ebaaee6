"""Activations of feed-forward layers, plain or as the gate of another half (Shazeer, 2020); in float32.

Tensors are [..., width] of any floating dtype, in which the results are. At the least a call reads its input and writes
its result once: 3 · width numbers a row of the gated forms, 2 · width of `activate`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u with [g, u] the halves of [..., 2 * width]: [..., width] (SwiGLU; Shazeer, 2020)."""
    return activate_and_mul(gate_up, "silu", exact=exact)


def activate_and_mul(gate_up: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    """y = act(g) * u with [g, u] the halves of [..., 2 * width]: [..., width]; `kind` is a key of FUNCTIONS."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (FUNCTIONS[kind](gate) * up).to(gate_up.dtype)


def activate(x: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    """y = act(x), of the shape of x; `kind` is a key of FUNCTIONS."""
    return FUNCTIONS[kind](x.float()).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    """The approximation by tanh (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
    "relu_squared": lambda x: torch.relu(x) * torch.relu(x),
}
