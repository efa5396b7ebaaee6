"""A mixture-of-experts layer, written to be read. kernels.ops.experts has the contracts."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.activation import silu_and_mul

SMALLEST_SUM = 1e-20


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """`gate_up` [experts, 2 * width, hidden], the gate first, and `down` [experts, hidden, width]."""

    gate_up: Tensor
    down: Tensor


def route(
    logits: Tensor, top_k: int, *, scoring: Literal["softmax", "sigmoid"] = "softmax", renormalize: bool
) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    scores = wide.softmax(dim=-1) if scoring == "softmax" else wide.sigmoid()
    order = torch.where(wide.isnan(), -torch.inf, wide).sort(dim=-1, descending=True, stable=True).indices
    expert_ids = order[:, :top_k]
    weights = scores.gather(-1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_SUM)
    return weights, expert_ids.int()


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    return PackedExperts(gate_up, down)


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, exact: bool = False) -> Tensor:
    """Each expert computes the tokens that chose it; a token adds what its experts gave, the first choice first."""
    given = torch.zeros((*expert_ids.shape, x.shape[-1]), dtype=x.dtype, device=x.device)
    for expert_id, (gate_up, down) in enumerate(zip(packed.gate_up, packed.down, strict=True)):
        tokens, choices = (expert_ids == expert_id).nonzero(as_tuple=True)
        hidden = silu_and_mul(F.linear(x[tokens], gate_up))
        given[tokens, choices] = (F.linear(hidden, down).float() * weights[tokens, choices, None]).to(x.dtype)
    total = given[:, 0].float()
    for choice in range(1, given.shape[1]):
        total = total + given[:, choice].float()
    return total.to(x.dtype)
