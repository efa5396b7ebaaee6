"""A model family as data: what the one decoder needs to know, and where a checkpoint keeps its tensors."""

import msgspec

from services.worker.layers.attention import HeadShape
from services.worker.layers.positions import Rope


class ModelSpec(msgspec.Struct, frozen=True):
    """A decoder-only transformer: pre-norm, RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `windows` has one entry per layer: how many positions a token sees there, itself included, or None for all.
    `max_positions` is the longest context the checkpoint states.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Rope
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def num_parameters(self) -> int:
        """Weights of matrices, embeddings and norms; a tied head counts once."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size + 2)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


class LayerNames(msgspec.Struct, frozen=True):
    """Names within a layer, after its prefix and before `.weight` or `.bias`."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


class WeightNames(msgspec.Struct, frozen=True):
    """Where a checkpoint keeps its tensors; the defaults are those of Llama, which most families took over.

    `ignored` are endings of tensors that some old checkpoints carry and nobody needs.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{}."
    layer_names: LayerNames = LayerNames()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


class Family(msgspec.Struct, frozen=True):
    """What a translator makes of a checkpoint's configuration."""

    spec: ModelSpec
    names: WeightNames
