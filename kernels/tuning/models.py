"""The weights of a decoder layer and its head, from a model's sizes."""

from typing import Any

from kernels.tuning.candidates import Weight


def _sizes(hidden: int, num_heads: int, intermediate: int, vocab_size: int) -> dict[str, Any]:
    sizes = {"hidden": hidden, "num_heads": num_heads, "intermediate": intermediate, "vocab_size": vocab_size}
    return {**sizes, "num_kv_heads": 8, "head_dim": 128}


MODELS = {
    "Llama-3.1-8B": _sizes(4096, 32, 14336, 128_256),
    "Qwen3-8B": _sizes(4096, 32, 12288, 151_936),
    "Qwen3-0.6B": _sizes(1024, 16, 3072, 151_936),
}
"""Shapes that can be tuned without a checkpoint at hand; a test holds them against kernels/fused/declared.py."""


def weights_of(
    *,
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab_size: int,
    dtype: str,
    up: tuple[str, int] | None = None,
) -> tuple[Weight, ...]:
    """Merged query-key-value, output, merged gate-up, down and head, as services/worker/layers calls them. `up` is the
    operation and width of a first product that is no SwiGLU's; an `intermediate` of 0 leaves the feed-forward out."""
    up_op, up_width = up or ("gated_linear", intermediate)
    feed_forward = (Weight(up_op, up_width, hidden, dtype), Weight("linear_add", hidden, intermediate, dtype))
    return (
        Weight("linear", (num_heads + 2 * num_kv_heads) * head_dim, hidden, dtype),
        Weight("linear_add", hidden, num_heads * head_dim, dtype),
        *(feed_forward if intermediate else ()),
        Weight("linear", vocab_size, hidden, dtype),
    )
