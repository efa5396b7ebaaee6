"""Mistral (dense): Llama with one sliding window for all layers, or none."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, ModelSpec, WeightNames

DEFAULTS = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    settings.require("layer_types", None)
    num_layers = settings.integer("num_hidden_layers")
    # a key left out means 4096, as in transformers; an explicit null means no window
    window = config.get("sliding_window", 4096)
    spec = ModelSpec(
        architecture="mistral",
        vocab_size=settings.integer("vocab_size"),
        hidden_size=settings.integer("hidden_size"),
        intermediate_size=settings.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=settings.integer("num_attention_heads"),
        num_kv_heads=settings.num_kv_heads(),
        head_dim=settings.head_dim(),
        norm_eps=settings.number("rms_norm_eps"),
        max_positions=settings.integer("max_position_embeddings"),
        rope=settings.rope(),
        windows=(None if window is None else settings.integer("sliding_window"),) * num_layers,
        tied_embeddings=settings.flag("tie_word_embeddings"),
    )
    return Family(spec, WeightNames())
