"""Qwen3 (dense): Llama with per-head norms of q and k, and a head_dim of its own."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, ModelSpec, WeightNames

DEFAULTS = {
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="qwen3",
        vocab_size=settings.integer("vocab_size"),
        hidden_size=settings.integer("hidden_size"),
        intermediate_size=settings.integer("intermediate_size"),
        num_layers=settings.integer("num_hidden_layers"),
        num_heads=settings.integer("num_attention_heads"),
        num_kv_heads=settings.num_kv_heads(),
        head_dim=settings.head_dim(),
        norm_eps=settings.number("rms_norm_eps"),
        max_positions=settings.integer("max_position_embeddings"),
        rope=settings.rope(),
        windows=settings.layer_windows(),
        tied_embeddings=settings.flag("tie_word_embeddings"),
        qkv_bias=biased,
        out_bias=biased,
        qk_norm=True,
    )
    return Family(spec, WeightNames())
