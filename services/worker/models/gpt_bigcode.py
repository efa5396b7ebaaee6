"""GPTBigCode (StarCoder, SantaCoder): GPT-2 with one KV head for all query heads, and ordinary matrices."""

from typing import Any

from services.worker.layers.positions import Learned
from services.worker.models import gpt2
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

DEFAULTS = {
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "multi_query": True,
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
        qkv=Stored(("attn.c_attn",), interleaved=True),
        out=Stored(("attn.c_proj",)),
        up=Stored(("mlp.c_fc",)),
        down=Stored(("mlp.c_proj",)),
    ),
    ignored=("attn.bias", "attn.masked_bias"),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, gpt2.SPELLINGS)
    settings.require("scale_attn_weights", True)
    settings.require("add_cross_attention", None, False)
    shape = settings.shape(grouped=False)
    width = 4 * shape["hidden_size"] if settings.get("n_inner") is None else settings.integer("n_inner")
    shape["num_kv_heads"] = 1 if settings.flag("multi_query") else shape["num_heads"]
    spec = ModelSpec(
        architecture="gpt_bigcode",
        **shape,
        windows=settings.no_windows(),
        positions=Learned(shape["max_positions"]),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon")),
        feed_forward=Plain(width, settings.activation("activation_function")),
        qkv_bias=True,
        out_bias=True,
    )
    return Family(spec, NAMES)
