"""Qwen3 (dense): Llama with per-head norms of q and k, and a head_dim of its own."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, ModelSpec, RmsNormSpec, WeightNames

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
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="qwen3",
        **settings.shape(),
        windows=settings.layer_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        qkv_bias=biased,
        out_bias=biased,
        qk_norm="heads",
    )
    return Family(spec, WeightNames())
