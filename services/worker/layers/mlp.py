"""Feed-forward layers."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops.experts import PackedExperts, experts, route
from kernels.ops.forms import Products
from services.worker.layers.linear import ActivatedLinear, GatedLinear, Linear


class FeedForward(Protocol):
    def __call__(self, x: Tensor, *, exact: bool) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        """residual + this layer of x."""
        ...

    def products(self, *, added: bool) -> Products:
        """Its products by operation (see kernels.ops.forms), the last one with a residual's addition or without."""
        ...


class Mlp:
    """down(up(x)), gated (SwiGLU, GeGLU) or with a plain activation, as `up` is."""

    __slots__ = ("down", "up")

    def __init__(self, up: GatedLinear | ActivatedLinear, down: Linear) -> None:
        self.up, self.down = up, down

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return self.down(self.up(x, exact=exact), exact=exact)

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return self.down.add(self.up(x, exact=exact), residual, exact=exact)

    def products(self, *, added: bool) -> Products:
        return [*self.up.products(), ("linear_add" if added else "linear", self.down.packed)]


class ExpertsMlp:
    """A mixture of experts, and an expert for every token where there is one.

    `router` gives a logit per expert and, behind them, that of the shared expert's gate.
    """

    __slots__ = ("packed", "renormalize", "router", "shared", "top_k")

    def __init__(
        self, router: Linear, packed: PackedExperts, top_k: int, *, renormalize: bool, shared: Mlp | None = None
    ) -> None:
        self.router, self.packed, self.top_k = router, packed, top_k
        self.renormalize, self.shared = renormalize, shared

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        logits = self.router(x, exact=exact)
        if self.shared is None:
            return self._chosen(x, logits, exact)
        share = torch.softmax(F.pad(logits[:, -1:].float(), (0, 1)), dim=-1)[:, :1]  # σ, row by row
        shared = self.shared(x, exact=exact)
        return self._chosen(x, logits[:, :-1], exact) + (share * shared).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return residual + self(x, exact=exact)

    def _chosen(self, x: Tensor, logits: Tensor, exact: bool) -> Tensor:
        weights, expert_ids = route(logits, self.top_k, renormalize=self.renormalize)
        return experts(x, self.packed, weights, expert_ids, exact=exact)

    def products(self, *, added: bool) -> Products:
        shared = [] if self.shared is None else self.shared.products(added=False)
        return [("linear", self.router.packed), *shared]
