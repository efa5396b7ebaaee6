"""Qwen2 and Qwen2.5 (dense): Llama with biases on q, k and v, and an optional window on the later layers."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    spec = ModelSpec(
        architecture="qwen2",
        **settings.shape(),
        windows=settings.layer_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        qkv_bias=True,
    )
    return Family(spec, WeightNames())
