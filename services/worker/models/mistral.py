"""Mistral (dense): Llama with one sliding window for all layers, or none."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def translate(config: dict[str, Any]) -> Family:
    # a key left out means 4096, as in transformers; an explicit null means no window
    settings = Settings({"sliding_window": 4096} | config, DEFAULTS)
    settings.require("layer_types", None)
    spec = ModelSpec(
        architecture="mistral",
        **settings.shape(),
        windows=settings.one_window(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
    )
    return Family(spec, WeightNames())
