"""Command R: attention and feed-forward of one norm, rope on pairs side by side, scaled logits."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, LayerNormSpec, ModelSpec, WeightNames

DEFAULTS = {
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "hidden_act": "silu",
    "logit_scale": 0.0625,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="cohere",
        **settings.shape(),
        windows=settings.no_windows(),
        positions=settings.rotary(interleaved=True),
        norm=LayerNormSpec(settings.epsilon("layer_norm_eps"), biased=False),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        block="parallel",
        qkv_bias=biased,
        out_bias=biased,
        qk_norm="heads_centred" if settings.flag("use_qk_norm") else None,
        logit_scale=settings.number("logit_scale"),
    )
    return Family(spec, WeightNames())
