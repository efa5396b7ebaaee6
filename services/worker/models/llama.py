"""Llama 1 to 3.x, and the many checkpoints that call themselves LlamaForCausalLM."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, ModelSpec, WeightNames

DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu", "swish")
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="llama",
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
        windows=(None,) * settings.integer("num_hidden_layers"),
        tied_embeddings=settings.flag("tie_word_embeddings"),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=settings.flag("mlp_bias"),
    )
    return Family(spec, WeightNames())
