"""Mixture-of-experts layers (Shazeer et al., 2017): routing, and gated experts of which each token uses a few.

With `exact`, a token's result has the same bits whatever the other tokens are, however many there are and whichever
experts they choose. The fused bodies raise ValueError where shapes, dtypes or strides do not fit.
"""

from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

from kernels.cpu import experts as cpu
from kernels.ops import choice
from kernels.reference import experts as reference

if TYPE_CHECKING:
    from kernels.fused import experts as fused

Scoring: TypeAlias = Literal["softmax", "sigmoid"]
PackedExperts: TypeAlias = "cpu.PackedExperts | fused.PackedExperts"


def route(logits: Tensor, top_k: int, *, scoring: Scoring = "softmax", renormalize: bool) -> tuple[Tensor, Tensor]:
    """(weights float32, expert ids int32), both [tokens, top_k], from a router's logits [tokens, experts].

    A token's experts are those of its `top_k` highest logits, best first, among equals the lowest id first; a NaN comes
    last, so ids are always valid and distinct. A weight is the expert's share of the softmax over all experts, or the
    sigmoid of its logit, in float32; with `renormalize` divided by the sum of the token's weights (or 1e-20, if less).
    """
    if not choice.is_fused(logits):
        return reference.route(logits, top_k, scoring=scoring, renormalize=renormalize)
    from kernels.fused import experts as fused

    return fused.route(logits, top_k, scoring=scoring, renormalize=renormalize)


def pack_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float = 0.0,
) -> PackedExperts:
    """Bring `gate_up` [experts, 2 * width, hidden], the gate first, and `down` [experts, hidden, width] into the form
    that their device likes best. The result is opaque, and may hold a copy.

    Biases are [experts, 2 * width] and [experts, hidden], both or none. The gate is silu(g) * u (SwiGLU) or, with a
    `clamp` c, that of gpt-oss: g σ(1.702 g) * (u + 1) with g at most c and u within ±c.
    """
    if not choice.is_fused(down):
        return cpu.pack_experts(gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, clamp=clamp)
    from kernels.fused import experts as fused

    return fused.pack_experts(gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, clamp=clamp)


def experts(x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, exact: bool = False) -> Tensor:
    """y = Σ weight · down(gate(g, u)) with [g, u] = gate_up(x), over the token's experts in the order of `expert_ids`.

    `x` is [tokens, hidden], contiguous, in the dtype of the weights, and so is the result; `weights` and `expert_ids`
    come from `route`, and no token names an expert twice. What an expert gives is rounded to the dtype of x, weighted;
    these are summed in float32.
    """
    if isinstance(packed, cpu.PackedExperts):
        return cpu.experts(x, packed, weights, expert_ids, exact=exact)
    from kernels.fused import experts as fused

    return fused.experts(x, packed, weights, expert_ids, exact=exact)
