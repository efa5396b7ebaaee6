"""A model family as data: what the one decoder needs to know, and where a checkpoint keeps its tensors."""

from typing import Literal, TypeAlias

import msgspec

from kernels.ops.activation import Activation
from services.worker.layers.attention import HeadShape
from services.worker.layers.positions import Alibi, Learned, LongRope, Rotary, Sinusoidal

Positions: TypeAlias = Rotary | Alibi | Learned | Sinusoidal


class RmsNormSpec(msgspec.Struct, frozen=True, tag="rms"):
    """RMSNorm; with `plus_one` its factor is the weight + 1, as Gemma stores it."""

    eps: float
    plus_one: bool = False


class LayerNormSpec(msgspec.Struct, frozen=True, tag="layer"):
    """LayerNorm, with a bias or without."""

    eps: float
    biased: bool = True


Norm: TypeAlias = RmsNormSpec | LayerNormSpec

Block: TypeAlias = Literal["pre_norm", "post_norm", "sandwich", "parallel", "parallel_two_norms"]
"""pre_norm: h = x + a(n₁(x)), h + f(n₂(h)); post_norm: h = n₁(x + a(x)), n₂(h + f(h)); sandwich: pre_norm whose two
terms are normed again before they are added; parallel: x + a(n(x)) + f(n(x)), or with two norms n₁ and n₂ of x."""

QkNorm: TypeAlias = Literal["heads", "heads_centred", "projection"]
"""heads: one RMSNorm for every head (Qwen3, Gemma 3); heads_centred: a LayerNorm with weights of its own for each head,
without bias (Cohere); projection: an RMSNorm over all heads together (OLMoE). `eps` is that of the other norms."""


class Gated(msgspec.Struct, frozen=True, tag="gated"):
    """down(act(gate(x)) * up(x)): SwiGLU, GeGLU."""

    width: int
    activation: Activation = "silu"
    biased: bool = False


class Plain(msgspec.Struct, frozen=True, tag="plain"):
    """down(act(up(x)))."""

    width: int
    activation: Activation
    biased: bool = True


class Experts(msgspec.Struct, frozen=True, tag="experts", kw_only=True):
    """`count` SwiGLU experts of which each token uses `top_k`, weighted with their shares of a softmax over all of them
    or, with `renormalize`, over those chosen. `biased`: router and experts have biases; `clamp`: the gate of gpt-oss.
    `shared_width` is that of an expert for every token, times the sigmoid of a gate of its own (Qwen2-MoE); 0: none."""

    count: int
    top_k: int
    width: int
    renormalize: bool
    biased: bool = False
    clamp: float = 0.0
    shared_width: int = 0


FeedForward: TypeAlias = Gated | Plain | Experts


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer.

    `windows` has one entry per layer: how many positions a token sees there, itself included, or None for all.
    `max_positions` is the longest context that is served unasked, `stretched_positions` the longest that can be asked
    for where a longrope has other factors for it. `attention_scale` 0 is head_dim ** -0.5; a cap, a clip or a width
    of 0 is none. `embedding_width` is that of embeddings that a matrix brings to the hidden size and back (OPT-350m).
    Logits are multiplied with `logit_scale`, then capped.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    stretched_positions: int = 0
    windows: tuple[int | None, ...]
    positions: Positions
    norm: Norm
    feed_forward: FeedForward
    block: Block = "pre_norm"
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QkNorm | None = None
    qkv_clip: float = 0.0
    attention_scale: float = 0.0
    attention_soft_cap: float = 0.0
    sinks: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_width: int = 0
    final_norm: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def scale(self) -> float:
        """Of attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    def serving(self, max_model_len: int) -> "ModelSpec":
        """The spec for contexts of up to so many tokens, 0: what is served unasked. A longrope makes a difference."""
        if max_model_len <= self.max_positions or not self.stretched_positions:
            return self
        assert isinstance(self.positions, Rotary)
        ropes = (
            msgspec.structs.replace(rope, stretched=True) if isinstance(rope, LongRope) else rope
            for rope in self.positions.ropes
        )
        positions = msgspec.structs.replace(self.positions, ropes=tuple(ropes))
        return msgspec.structs.replace(
            self, positions=positions, max_positions=self.stretched_positions, stretched_positions=0
        )

    @property
    def embedded_width(self) -> int:
        return self.embedding_width or self.hidden_size


class Stored(msgspec.Struct, frozen=True):
    """How a checkpoint keeps a matrix of ours that has several parts (q, k, v; gate, up), or one.

    parts         names after the layer's prefix: a tensor for each part, or one for all; with {} one for each expert
    weight, bias  what a name ends with
    transposed    kept as [in, out]
    interleaved   parts are not one behind the other: each KV head has its q, k and v together; each gate its up
    """

    parts: tuple[str, ...]
    weight: str = ".weight"
    bias: str = ".bias"
    transposed: bool = False
    interleaved: bool = False


class LayerNames(msgspec.Struct, frozen=True):
    """Names within a layer, after its prefix. Norms end in `.weight` and `.bias`. `up` is the gate and up projection
    of a gated layer, and that of all experts where there are any."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = "post_feedforward_layernorm"
    qkv: Stored = Stored(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    out: Stored = Stored(("self_attn.o_proj",))
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    up: Stored = Stored(("mlp.gate_proj", "mlp.up_proj"))
    down: Stored = Stored(("mlp.down_proj",))
    router: str = "mlp.gate"
    shared_up: Stored = Stored(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"))
    shared_down: Stored = Stored(("mlp.shared_expert.down_proj",))
    shared_gate: str = "mlp.shared_expert_gate"


EXPERT_NAMES = LayerNames(
    up=Stored(("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")), down=Stored(("mlp.experts.{}.down_proj",))
)
"""As most mixtures of experts have it."""


class WeightNames(msgspec.Struct, frozen=True):
    """Where a checkpoint keeps its tensors, before `.weight` and `.bias`; the defaults are those of Llama, which most
    families took over. A checkpoint may leave out the first word of `base` (GPT-2's on the hub do).

    `ignored` are endings of tensors that some old checkpoints carry and nobody needs.
    """

    base: str = "model."
    embedding: str = "embed_tokens"
    positions: str = "embed_positions"
    embedding_norm: str = "embed_layernorm"
    project_in: str = "project_in"
    project_out: str = "project_out"
    final_norm: str = "norm"
    head: str = "lm_head"
    layer: str = "layers.{}."
    layer_names: LayerNames = LayerNames()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


class Family(msgspec.Struct, frozen=True):
    """What a translator makes of a checkpoint's configuration."""

    spec: ModelSpec
    names: WeightNames

    def serving(self, max_model_len: int) -> "Family":
        """With the spec for contexts of up to so many tokens."""
        return Family(self.spec.serving(max_model_len), self.names)
