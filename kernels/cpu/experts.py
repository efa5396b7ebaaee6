"""A mixture-of-experts layer on a CPU: the products of kernels.cpu.linear, one expert after another.

Routing is the specification's: it is a small part of a step. With `exact`, a product's rows do not depend on each other
(kernels.cpu.linear), and a token adds its experts in its own order, one element at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import linear
from kernels.cpu.activation import exact_silu
from kernels.reference.experts import STEEPNESS


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One packed gate-up and one packed down projection per expert; with a `clamp` the gate is not in the product."""

    gate_up: tuple[linear.PackedGate | linear.PackedLinear, ...]
    down: tuple[linear.PackedLinear, ...]
    clamp: float


def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float = 0.0,
) -> PackedExperts:
    pack = linear.pack_linear if clamp > 0 else linear.pack_gated
    none = (None,) * len(down)
    return PackedExperts(
        tuple(map(pack, gate_up, none if gate_up_bias is None else gate_up_bias)),
        tuple(map(linear.pack_linear, down, none if down_bias is None else down_bias)),
        clamp,
    )


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, exact: bool = False) -> Tensor:
    given = torch.empty((*expert_ids.shape, x.shape[-1]), dtype=x.dtype)
    num_choices = expert_ids.shape[1]
    order = expert_ids.flatten().argsort(stable=True)
    ends = torch.bincount(expert_ids.flatten(), minlength=len(packed.down)).cumsum(0).tolist()
    for start, end, gate_up, down in zip([0, *ends], ends, packed.gate_up, packed.down, strict=False):
        if start == end:
            continue
        places = order[start:end]
        tokens, choices = places // num_choices, places % num_choices
        if isinstance(gate_up, linear.PackedGate):
            hidden = linear.gated_linear(x[tokens], gate_up, exact=exact)
        else:
            hidden = _clamped_gate(linear.linear(x[tokens], gate_up, exact=exact), packed.clamp)
        y = linear.linear(hidden, down, exact=exact)
        given[tokens, choices] = (y.float() * weights[tokens, choices, None]).to(x.dtype)
    total = given[:, 0].float()
    for choice in range(1, num_choices):
        total = total + given[:, choice].float()
    return total.to(x.dtype)


def _clamped_gate(gate_up: Tensor, clamp: float) -> Tensor:
    """kernels.reference.experts.clamped_gate, its sigmoid by way of the one that treats all elements alike."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    swish = exact_silu(STEEPNESS * gate.clamp(max=clamp)) / STEEPNESS
    return (swish * (up.clamp(-clamp, clamp) + 1)).to(gate_up.dtype)
