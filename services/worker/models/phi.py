"""Phi 1, 1.5 and 2: rope on part of each head, attention and feed-forward of one norm, biases everywhere."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

DEFAULTS = {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
NAMES = WeightNames(
    final_norm="final_layernorm",
    layer_names=LayerNames(
        out=Stored(("self_attn.dense",)),
        up=Stored(("mlp.fc1",)),
        down=Stored(("mlp.fc2",)),
    ),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("qk_layernorm", None, False)
    spec = ModelSpec(
        architecture="phi",
        **settings.shape(),
        windows=settings.no_windows(),
        positions=settings.rotary(partial=0.5),
        norm=LayerNormSpec(settings.epsilon("layer_norm_eps")),
        feed_forward=Plain(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        block="parallel",
        qkv_bias=True,
        out_bias=True,
        head_bias=True,
    )
    return Family(spec, NAMES)
