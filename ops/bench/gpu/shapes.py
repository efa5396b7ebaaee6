"""The shapes of real models, as their config.json has them, and which cases the engine runs at each."""

from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
QWEN3_06B = QWEN3_8B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
SHAPES = {"llama-3.1-8b": LLAMA_8B, "qwen3-8b": QWEN3_8B, "qwen3-0.6b": QWEN3_06B}

ALL_DECODE = ("ttft", "decode-1", "decode-16", "decode-64", "decode-256", "prefill")
CASES_OF = {
    "llama-3.1-8b": (*ALL_DECODE, "equal", "tail", "exact", "exactness"),
    "qwen3-8b": (*ALL_DECODE, "bulk", "full"),
    "qwen3-0.6b": ("decode-1", "decode-256", "ragged", "exactness", "soak"),
}
"""Shape → the engine's cases, functions of `engine.py`."""


def config_of(shape: str, *, dry: bool) -> dict[str, Any]:
    """A shape's config.json; dry, the same family at toy size."""
    special = {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
    return {**SHAPES[shape], **(TOY if dry else {}), **special}
