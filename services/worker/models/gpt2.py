"""GPT-2: learned positions, LayerNorm, biases everywhere, matrices kept as [in, out]."""

from typing import Any

from services.worker.layers.positions import Learned
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
DEFAULTS = {
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
}
NAMES = WeightNames(
    base="transformer.",
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    layer="h.{}.",
    layer_names=LayerNames(
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=Stored(("attn.c_attn",), transposed=True),
        out=Stored(("attn.c_proj",), transposed=True),
        up=Stored(("mlp.c_fc",), transposed=True),
        down=Stored(("mlp.c_proj",), transposed=True),
    ),
    ignored=("attn.bias", "attn.masked_bias"),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", None, False)
    settings.require("add_cross_attention", None, False)
    shape = settings.shape(grouped=False)
    width = 4 * shape["hidden_size"] if settings.get("n_inner") is None else settings.integer("n_inner")
    spec = ModelSpec(
        architecture="gpt2",
        **shape,
        windows=settings.no_windows(),
        positions=Learned(shape["max_positions"]),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon")),
        feed_forward=Plain(width, settings.activation("activation_function")),
        qkv_bias=True,
        out_bias=True,
    )
    return Family(spec, NAMES)
