"""Self-attention over the paged cache."""

from dataclasses import dataclass

from torch import Tensor

from kernels.ops.attention import AttentionPlan, paged_attention, rotate_and_write
from services.worker.layers.linear import Linear
from services.worker.layers.norm import RmsNorm


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What every attention layer of a step shares. `plans` are by cache group; cos and sin are [tokens, head_dim]."""

    pool: Tensor
    plans: tuple[AttentionPlan, ...]
    cos: Tensor
    sin: Tensor
    exact: bool


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Query heads, KV heads and the width of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Attention:
    """q, k, v in one projection; per-head norms where the model has them; rope; pages; output projection.

    `place` is the layer's cache group and its number there (shared/cache_groups.py).
    """

    __slots__ = ("group", "heads", "k_norm", "layer_id", "out", "q_norm", "qkv", "scale")

    def __init__(
        self,
        place: tuple[int, int],
        heads: HeadShape,
        qkv: Linear,
        out: Linear,
        *,
        q_norm: RmsNorm | None = None,
        k_norm: RmsNorm | None = None,
    ) -> None:
        self.group, self.layer_id = place
        self.heads = heads
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm
        self.scale = heads.head_dim**-0.5

    def add(self, x: Tensor, residual: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        """residual + attention(x); K and V of all tokens are in their pages before any is read. `wanted` [S] selects
        the tokens to answer for, where that is not all of them."""
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        heads = self.qkv(x, exact=step.exact).view(-1, num_heads + 2 * num_kv_heads, self.heads.head_dim)
        plan = step.plans[self.group]
        queries = rotate_and_write(
            heads,
            step.pool,
            self.layer_id,
            plan,
            step.cos,
            step.sin,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            exact=step.exact,
        )
        if wanted is not None and wanted.shape[0] == 0:
            return residual[:0]
        attended = paged_attention(queries, step.pool, self.layer_id, plan, self.scale)
        flat = attended.view(x.shape[0], -1)
        if wanted is not None:
            flat, residual = flat.index_select(0, wanted), residual.index_select(0, wanted)
        return self.out.add(flat, residual, exact=step.exact)
