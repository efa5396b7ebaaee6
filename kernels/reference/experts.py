"""A mixture-of-experts layer, written to be read. kernels.ops.experts has the contracts.

At the least a call reads the matrices of each expert that was chosen, 3 · width · hidden numbers, however many tokens
chose it, and reads and writes a row of `hidden` numbers a token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.activation import silu_and_mul

SMALLEST_SUM = 1e-20
STEEPNESS = 1.702
"""Of the sigmoid in the gate of gpt-oss."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """`gate_up` [experts, 2 * width, hidden], the gate first, and `down` [experts, hidden, width]; their biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    clamp: float


def route(
    logits: Tensor, top_k: int, *, scoring: Literal["softmax", "sigmoid"] = "softmax", renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Weights float32 and expert ids int32, both [tokens, top_k], the best first, from `logits` [tokens, experts]
    (Shazeer et al., 2017; renormalized as in Mixtral). Of equal ones the lower id is first, a NaN is last."""
    wide = logits.float()
    scores = wide.softmax(dim=-1) if scoring == "softmax" else wide.sigmoid()
    order = torch.where(wide.isnan(), -torch.inf, wide).sort(dim=-1, descending=True, stable=True).indices
    expert_ids = order[:, :top_k]
    weights = scores.gather(-1, expert_ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_SUM)
    return weights, expert_ids.int()


def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float = 0.0,
) -> PackedExperts:
    return PackedExperts(gate_up, down, gate_up_bias, down_bias, clamp)


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, exact: bool = False) -> Tensor:
    """Each expert computes the tokens that chose it; a token adds what its experts gave, the first choice first.

    y = Σ w · down(silu(gate(x)) * up(x)): [tokens, hidden] of x, in its dtype, which is that of the matrices too.
    """
    given = torch.zeros((*expert_ids.shape, x.shape[-1]), dtype=x.dtype, device=x.device)
    for expert_id, (gate_up, down) in enumerate(zip(packed.gate_up, packed.down, strict=True)):
        tokens, choices = (expert_ids == expert_id).nonzero(as_tuple=True)
        both = F.linear(x[tokens], gate_up, None if packed.gate_up_bias is None else packed.gate_up_bias[expert_id])
        hidden = clamped_gate(both, packed.clamp) if packed.clamp > 0 else silu_and_mul(both)
        y = F.linear(hidden, down, None if packed.down_bias is None else packed.down_bias[expert_id])
        given[tokens, choices] = (y.float() * weights[tokens, choices, None]).to(x.dtype)
    total = given[:, 0].float()
    for choice in range(1, given.shape[1]):
        total = total + given[:, choice].float()
    return total.to(x.dtype)


def clamped_gate(gate_up: Tensor, clamp: float) -> Tensor:
    """y = g σ(1.702 g) * (u + 1) with [g, u] the halves of the last dimension, g at most `clamp` and u within ±clamp
    (gpt-oss); in float32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return (gate * torch.sigmoid(STEEPNESS * gate) * (up + 1)).to(gate_up.dtype)
