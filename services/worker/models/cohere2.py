"""Command R7B and A: Cohere with windows in three of four layers; those without a window have no rope either."""

from typing import Any

from services.worker.layers.positions import Rotary
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, LayerNormSpec, ModelSpec, WeightNames

DEFAULTS = {
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "hidden_act": "silu",
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "tie_word_embeddings": True,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    biased, rotary = settings.flag("attention_bias"), settings.rotary(interleaved=True)
    windows = settings.windows_of(settings.layer_types(every=settings.integer("sliding_window_pattern")))
    ropes = (None if window is None else rope for window, rope in zip(windows, rotary.ropes, strict=True))
    spec = ModelSpec(
        architecture="cohere2",
        **settings.shape(),
        windows=windows,
        positions=Rotary(tuple(ropes), rotary.dim, interleaved=True),
        norm=LayerNormSpec(settings.epsilon("layer_norm_eps"), biased=False),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        block="parallel",
        qkv_bias=biased,
        out_bias=biased,
        logit_scale=settings.number("logit_scale"),
    )
    return Family(spec, WeightNames())
