"""A mixture-of-experts layer on a CPU: the products of kernels.cpu.linear, one expert after another.

Routing is the specification's: it is a small part of a step. With `exact`, a product's rows do not depend on each other
(kernels.cpu.linear), and a token adds its experts in its own order, one element at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import linear


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """One packed gate-up and one packed down projection per expert."""

    gate_up: tuple[linear.PackedGate, ...]
    down: tuple[linear.PackedLinear, ...]


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    return PackedExperts(tuple(map(linear.pack_gated, gate_up)), tuple(map(linear.pack_linear, down)))


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
        hidden = linear.gated_linear(x[tokens], gate_up, exact=exact)
        y = linear.linear(hidden, down, exact=exact)
        given[tokens, choices] = (y.float() * weights[tokens, choices, None]).to(x.dtype)
    total = given[:, 0].float()
    for choice in range(1, num_choices):
        total = total + given[:, choice].float()
    return total.to(x.dtype)
