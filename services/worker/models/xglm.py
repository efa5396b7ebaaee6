"""XGLM: sinusoidal positions, scaled embeddings."""

from typing import Any

from services.worker.layers.positions import Sinusoidal
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {"num_attention_heads": "attention_heads", "hidden_size": "d_model", "num_hidden_layers": "num_layers"}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "activation_function": "gelu",
    "scale_embedding": True,
    "tie_word_embeddings": True,
}
EPS = 1e-5
OFFSET = 2
NAMES = WeightNames(
    final_norm="layer_norm",
    layer_names=LayerNames(
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        out=Stored(("self_attn.out_proj",)),
        up=Stored(("fc1",)),
        down=Stored(("fc2",)),
    ),
    ignored=("embed_positions.weights",),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    settings.require("add_cross_attention", None, False)
    shape = settings.shape(grouped=False)
    if shape["hidden_size"] % 2 or shape["hidden_size"] < 4:
        raise settings.refusal("hidden_size", "must be even and at least 4 for sinusoidal positions")
    spec = ModelSpec(
        architecture="xglm",
        **shape,
        windows=settings.no_windows(),
        positions=Sinusoidal(OFFSET),
        norm=LayerNormSpec(EPS),
        feed_forward=Plain(settings.integer("ffn_dim"), settings.activation("activation_function")),
        qkv_bias=True,
        out_bias=True,
        embedding_scale=shape["hidden_size"] ** 0.5 if settings.flag("scale_embedding") else 1.0,
    )
    return Family(spec, NAMES)
