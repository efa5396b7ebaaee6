"""Gemma 1: Llama with scaled embeddings, GeGLU and norms whose factor is the weight + 1."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("use_bidirectional_attention", None, False)
    shape, biased = settings.shape(), settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="gemma",
        **shape,
        windows=settings.no_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps"), plus_one=True),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        qkv_bias=biased,
        out_bias=biased,
        embedding_scale=shape["hidden_size"] ** 0.5,
    )
    return Family(spec, WeightNames())
