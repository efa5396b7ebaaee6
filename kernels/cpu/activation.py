"""Activations on a CPU.

`F.silu` computes the last elements of each thread's share with another exponential than the rest, so its bits depend
on the number of rows; the exact body takes the sigmoid from the row-wise softmax kernel instead, which treats each
pair [x, 0] alike wherever it stands. torch.erf and torch.tanh treat all elements alike, so the specification of the
other activations is exact as it is (tests/kernels/test_exactness.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import activation as reference


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if exact:
        return (_exact_silu(gate) * up.float()).to(gate_up.dtype)
    return F.silu(gate).mul_(up)


def activate_and_mul(gate_up: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    if kind == "silu":
        return silu_and_mul(gate_up, exact=exact)
    return reference.activate_and_mul(gate_up, kind)


def activate(x: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    if kind == "silu":
        return _exact_silu(x).to(x.dtype) if exact else F.silu(x)
    return reference.activate(x, kind)


def _exact_silu(x: Tensor) -> Tensor:
    """float32."""
    wide = x.float()
    return wide * torch.softmax(torch.stack((wide, torch.zeros_like(wide)), dim=-1), dim=-1).select(-1, 0)
