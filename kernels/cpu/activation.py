"""Activations on a CPU.

`F.silu` computes the last elements of each thread's share with another exponential than the rest, so its bits depend
on the number of rows; the exact body takes the sigmoid from the row-wise softmax kernel instead, which treats each
pair [x, 0] alike wherever it stands. torch.erf and torch.tanh treat all elements alike, so the specification of the
other activations is exact as it is (tests/kernels/test_exactness.py). The gate of bfloat16 rows is one compiled pass,
which treats every row alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import choice
from kernels.reference import activation as reference


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    if choice.is_compiled(gate_up) and gate_up.ndim == 2 and gate_up.is_contiguous():
        from kernels.cpu.compiled import activation as compiled

        return compiled.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if exact:
        return (exact_silu(gate) * up.float()).to(gate_up.dtype)
    return F.silu(gate).mul_(up)


def activate_and_mul(gate_up: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    if kind == "silu":
        return silu_and_mul(gate_up, exact=exact)
    return reference.activate_and_mul(gate_up, kind)


def activate(x: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    if kind == "silu":
        return exact_silu(x).to(x.dtype) if exact else F.silu(x)
    return reference.activate(x, kind)


def exact_silu(x: Tensor) -> Tensor:
    """float32; an element's bits do not depend on where it stands."""
    wide = x.float()
    return wide * torch.softmax(torch.stack((wide, torch.zeros_like(wide)), dim=-1), dim=-1).select(-1, 0)
