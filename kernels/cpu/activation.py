"""The SwiGLU gate.

`F.silu` computes the last elements of each thread's share with another exponential than the rest, so its bits depend
on the number of rows; the exact body takes the sigmoid from the row-wise softmax kernel instead, which treats each
pair [x, 0] alike wherever it stands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if exact:
        wide = gate.float()
        sigmoid = torch.softmax(torch.stack((wide, torch.zeros_like(wide)), dim=-1), dim=-1).select(-1, 0)
        return (wide * sigmoid * up.float()).to(gate_up.dtype)
    return F.silu(gate).mul_(up)
