"""How many numbers a model is made of, from its spec: the exact form of 12 · layers · hidden², which is a layer of four
square matrices for attention and two of four times the width, without biases, norms and embeddings."""

import msgspec

from services.worker.layers.positions import Learned
from services.worker.models.spec import Experts, FeedForward, LayerNormSpec, ModelSpec, Plain


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters by what they are for. A tied head counts once, with the embeddings."""

    embedding: int
    """Tokens, learned positions, the head, and what lies between them and the hidden size."""
    attention: int
    feed_forward: int
    norms: int
    idle_experts: int = 0
    """Of `feed_forward`: what a token that is routed to its experts does not use."""

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.norms

    @property
    def active(self) -> int:
        """What a token uses, its whole embedding table included."""
        return self.total - self.idle_experts


def sizes_of(spec: ModelSpec) -> Sizes:
    """Every tensor of a checkpoint, counted (services.worker.models.weights.expected_tensors lists the same)."""
    norm = spec.hidden_size * (2 if isinstance(spec.norm, LayerNormSpec) and spec.norm.biased else 1)
    norms_per_layer = {"sandwich": 4, "parallel": 1}.get(spec.block, 2)
    matrices, active = feed_forward_matrices(spec.feed_forward, spec.hidden_size)
    feed_forward = matrices + _feed_forward_biases(spec.feed_forward, spec.hidden_size)
    return Sizes(
        embedding=_embedding(spec),
        attention=spec.num_layers * (attention_matrices(spec) + _attention_vectors(spec)),
        feed_forward=spec.num_layers * feed_forward,
        norms=norm * (spec.num_layers * norms_per_layer + spec.final_norm + spec.embedding_norm),
        idle_experts=spec.num_layers * (matrices - active),
    )


def attention_matrices(spec: ModelSpec) -> int:
    """Of one layer: q and out, k and v."""
    return spec.hidden_size * (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim


def feed_forward_matrices(kind: FeedForward, hidden: int) -> tuple[int, int]:
    """Of one layer: all, and those that one token uses."""
    if isinstance(kind, Plain):
        return (2 * hidden * kind.width,) * 2
    if not isinstance(kind, Experts):
        return (3 * hidden * kind.width,) * 2
    shared = 3 * hidden * kind.shared_width + (hidden if kind.shared_width else 0)
    always = shared + hidden * kind.count  # the router
    return always + 3 * hidden * kind.width * kind.count, always + 3 * hidden * kind.width * kind.top_k


def _embedding(spec: ModelSpec) -> int:
    tables = spec.vocab_size * spec.embedded_width * (1 if spec.tied_embeddings else 2)
    places = spec.positions.rows * spec.hidden_size if isinstance(spec.positions, Learned) else 0
    return tables + places + 2 * spec.hidden_size * spec.embedding_width + spec.vocab_size * spec.head_bias


def _attention_vectors(spec: ModelSpec) -> int:
    """Of one layer: biases, norms of q and k, sinks."""
    heads, both = spec.num_heads * spec.head_dim, (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    biases = spec.qkv_bias * (heads + 2 * spec.num_kv_heads * spec.head_dim) + spec.out_bias * spec.hidden_size
    qk_norms = {None: 0, "heads": 2 * spec.head_dim}.get(spec.qk_norm, both)
    return biases + qk_norms + spec.num_heads * spec.sinks


def _feed_forward_biases(kind: FeedForward, hidden: int) -> int:
    if not kind.biased:
        return 0
    if isinstance(kind, Experts):
        return kind.count * (2 * kind.width + hidden + 1)
    return (1 if isinstance(kind, Plain) else 2) * kind.width + hidden
