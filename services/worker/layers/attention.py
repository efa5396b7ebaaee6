"""Self-attention over the paged cache."""

from dataclasses import dataclass

from torch import Tensor

from kernels.ops.attention import AttentionPlan, paged_attention, rotate_and_write
from kernels.ops.forms import Products
from services.worker.layers.linear import Linear
from services.worker.layers.norm import Norm, RmsNorm
from services.worker.layers.positions import Rope, Turns


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What every attention layer of a step shares. `plans` are by cache group, `turns` by rope."""

    pool: Tensor
    plans: tuple[AttentionPlan, ...]
    turns: Turns
    exact: bool


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Query heads, KV heads and the width of each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How scores are made; see kernels.ops.attention.paged_attention. `rope` None: no rope."""

    scale: float
    rope: Rope | None = None
    interleaved: bool = False
    soft_cap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


class Attention:
    """q, k, v in one projection; norms of q and k where the model has them; rope; pages; output projection.

    `place` is the layer's cache group and its number there (shared/cache_groups.py).
    """

    __slots__ = ("group", "heads", "k_norm", "layer_id", "out", "q_norm", "qkv", "qkv_clip", "scoring")

    def __init__(
        self,
        place: tuple[int, int],
        heads: HeadShape,
        qkv: Linear,
        out: Linear,
        scoring: Scoring,
        *,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        qkv_clip: float = 0.0,
    ) -> None:
        (self.group, self.layer_id), self.heads, self.scoring = place, heads, scoring
        self.qkv, self.out, self.q_norm, self.k_norm, self.qkv_clip = qkv, out, q_norm, k_norm, qkv_clip

    def attend(self, x: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        """What `out` projects, [tokens, num_heads * head_dim]; K and V of all tokens are in their pages before any is
        read. `wanted` [S] selects the tokens to answer for, where that is not all of them."""
        heads = self.qkv(x, exact=step.exact)
        heads = heads.view(-1, self.heads.num_heads + 2 * self.heads.num_kv_heads, self.heads.head_dim)
        queries = self._rotate_and_write(heads, step)
        if wanted is not None and wanted.shape[0] == 0:
            return queries.new_empty(0, self.heads.num_heads * self.heads.head_dim)
        scoring = self.scoring
        attended = paged_attention(
            queries,
            step.pool,
            self.layer_id,
            step.plans[self.group],
            scoring.scale,
            soft_cap=scoring.soft_cap,
            alibi_slopes=scoring.alibi_slopes,
            sinks=scoring.sinks,
        )
        flat = attended.view(x.shape[0], -1)
        return flat if wanted is None else flat.index_select(0, wanted)

    def products(self, *, added: bool) -> Products:
        """Its products by operation (see kernels.ops.forms), `out` with a residual's addition or without."""
        return [("linear", self.qkv.packed), ("linear_add" if added else "linear", self.out.packed)]

    def _rotate_and_write(self, heads: Tensor, step: AttentionStep) -> Tensor:
        num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
        q_norm, k_norm = self.q_norm, self.k_norm
        fused = isinstance(q_norm, RmsNorm) and isinstance(k_norm, RmsNorm)
        if not fused and q_norm is not None and k_norm is not None:
            queries, keys = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
            queries.copy_(q_norm(queries, exact=step.exact))
            keys.copy_(k_norm(keys, exact=step.exact))
        if self.qkv_clip > 0:
            heads.clamp_(-self.qkv_clip, self.qkv_clip)
        cos, sin = step.turns[self.scoring.rope]
        return rotate_and_write(
            heads,
            step.pool,
            self.layer_id,
            step.plans[self.group],
            cos,
            sin,
            interleaved=self.scoring.interleaved,
            q_norm=q_norm.weight if isinstance(q_norm, RmsNorm) else None,
            k_norm=k_norm.weight if isinstance(k_norm, RmsNorm) else None,
            eps=q_norm.eps if isinstance(q_norm, RmsNorm) else 0.0,
            plus_one=isinstance(q_norm, RmsNorm) and q_norm.plus_one,
            exact=step.exact,
        )
