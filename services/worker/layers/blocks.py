"""The forms of a transformer block: where norms stand, and whether attention and feed-forward run one after the other.

Each takes hidden states [tokens, hidden_size]. `wanted` [S]: of these tokens only; behind the last layer nobody needs
the others.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.ops.forms import Products
from services.worker.layers.attention import Attention, AttentionStep
from services.worker.layers.mlp import FeedForward
from services.worker.layers.norm import Norm


class Layer(Protocol):
    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor: ...

    def products(self) -> Products:
        """Its products by operation; see kernels.ops.forms."""
        ...


@dataclass(frozen=True, slots=True)
class PreNormLayer:
    """h = x + attention(norm(x)); h + mlp(norm(h))."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: FeedForward

    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        exact = step.exact
        attended = self.attention.attend(self.attention_norm(hidden, exact=exact), step, wanted)
        hidden = _selected(hidden, wanted)
        if hidden.shape[0] == 0:
            return hidden
        hidden = self.attention.out.add(attended, hidden, exact=exact)
        return self.mlp.add(self.mlp_norm(hidden, exact=exact), hidden, exact=exact)

    def products(self) -> Products:
        return [*self.attention.products(added=True), *self.mlp.products(added=True)]


@dataclass(frozen=True, slots=True)
class PostNormLayer:
    """h = norm(x + attention(x)); norm(h + mlp(h)) (Vaswani et al., 2017; OPT-350m)."""

    attention: Attention
    attention_norm: Norm
    mlp: FeedForward
    mlp_norm: Norm

    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        exact = step.exact
        attended = self.attention.attend(hidden, step, wanted)
        hidden = _selected(hidden, wanted)
        if hidden.shape[0] == 0:
            return hidden
        hidden = self.attention_norm(self.attention.out.add(attended, hidden, exact=exact), exact=exact)
        return self.mlp_norm(self.mlp.add(hidden, hidden, exact=exact), exact=exact)

    def products(self) -> Products:
        return [*self.attention.products(added=True), *self.mlp.products(added=True)]


@dataclass(frozen=True, slots=True)
class SandwichLayer:
    """h = x + norm(attention(norm(x))); h + norm(mlp(norm(h))) (Gemma 2)."""

    attention_norm: Norm
    attention: Attention
    attention_post_norm: Norm
    mlp_norm: Norm
    mlp: FeedForward
    mlp_post_norm: Norm

    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        exact = step.exact
        attended = self.attention.attend(self.attention_norm(hidden, exact=exact), step, wanted)
        hidden = _selected(hidden, wanted)
        if hidden.shape[0] == 0:
            return hidden
        hidden = hidden + self.attention_post_norm(self.attention.out(attended, exact=exact), exact=exact)
        return hidden + self.mlp_post_norm(self.mlp(self.mlp_norm(hidden, exact=exact), exact=exact), exact=exact)

    def products(self) -> Products:
        return [*self.attention.products(added=False), *self.mlp.products(added=False)]


@dataclass(frozen=True, slots=True)
class ParallelLayer:
    """x + attention(norm(x)) + mlp(norm(x)), both of one norm (`mlp_norm` None) or each of its own."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm | None
    mlp: FeedForward

    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        exact = step.exact
        normed = self.attention_norm(hidden, exact=exact)
        attended = self.attention.attend(normed, step, wanted)
        hidden = _selected(hidden, wanted)
        if hidden.shape[0] == 0:
            return hidden
        x = _selected(normed, wanted) if self.mlp_norm is None else self.mlp_norm(hidden, exact=exact)
        return self.mlp.add(x, self.attention.out.add(attended, hidden, exact=exact), exact=exact)

    def products(self) -> Products:
        return [*self.attention.products(added=True), *self.mlp.products(added=True)]


def _selected(rows: Tensor, wanted: Tensor | None) -> Tensor:
    return rows if wanted is None else rows.index_select(0, wanted)
