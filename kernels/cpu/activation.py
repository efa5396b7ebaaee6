"""The SwiGLU gate; the decoder uses `gated_linear`, which needs no separate gate at all."""

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.linear import exact_sigmoid


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if exact:
        wide = gate.float()
        return (wide * exact_sigmoid(wide) * up.float()).to(gate_up.dtype)
    return F.silu(gate).mul_(up)
