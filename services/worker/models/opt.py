"""OPT: learned positions behind two unused rows, ReLU. The 350m one norms behind each half of a layer instead of
before it, and keeps its embeddings narrower than its hidden states."""

from typing import Any

from services.worker.layers.positions import Learned
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

DEFAULTS = {
    "max_position_embeddings": 2048,
    "activation_function": "relu",
    "tie_word_embeddings": True,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
EPS = 1e-5
OFFSET = 2
NAMES = WeightNames(
    base="model.decoder.",
    final_norm="final_layer_norm",
    layer_names=LayerNames(
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        out=Stored(("self_attn.out_proj",)),
        up=Stored(("fc1",)),
        down=Stored(("fc2",)),
    ),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("layer_norm_elementwise_affine", True)
    shape, biased, before = (
        settings.shape(grouped=False),
        settings.flag("enable_bias"),
        settings.flag("do_layer_norm_before"),
    )
    width = None if settings.get("word_embed_proj_dim") is None else settings.integer("word_embed_proj_dim")
    spec = ModelSpec(
        architecture="opt",
        **shape,
        windows=settings.no_windows(),
        positions=Learned(shape["max_positions"] + OFFSET, OFFSET),
        norm=LayerNormSpec(EPS),
        feed_forward=Plain(settings.integer("ffn_dim"), settings.activation("activation_function"), biased),
        block="pre_norm" if before else "post_norm",
        qkv_bias=biased,
        out_bias=biased,
        embedding_width=0 if width in (None, shape["hidden_size"]) else width,
        final_norm=before and not settings.flag("_remove_final_layer_norm"),
    )
    return Family(spec, NAMES)
