"""Llama 1 to 3.x, and the many checkpoints that call themselves LlamaForCausalLM."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="llama",
        **settings.shape(),
        windows=settings.no_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Gated(
            settings.integer("intermediate_size"), settings.activation("hidden_act"), settings.flag("mlp_bias")
        ),
        qkv_bias=biased,
        out_bias=biased,
    )
    return Family(spec, WeightNames())
