"""MPT: ALiBi, LayerNorm without biases, and none anywhere else.

transformers takes `alibi_bias_max` for 8 whatever it is; here it is heeded, as in the model's own code and in vLLM.
"""

from typing import Any

from services.worker.layers.positions import Alibi, alibi_slopes
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "expansion_ratio": 4,
    "no_bias": True,
    "tie_word_embeddings": True,
}
ATTENTION_DEFAULTS = {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8}
NAMES = WeightNames(
    base="transformer.",
    embedding="wte",
    final_norm="norm_f",
    layer="blocks.{}.",
    layer_names=LayerNames(
        attention_norm="norm_1",
        mlp_norm="norm_2",
        qkv=Stored(("attn.Wqkv",)),
        out=Stored(("attn.out_proj",)),
        up=Stored(("ffn.up_proj",)),
        down=Stored(("ffn.down_proj",)),
    ),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    settings.require("no_bias", True)
    settings.require("norm_type", None, "layernorm", "low_precision_layernorm")
    settings.require("expansion_ratio", 4)  # transformers reads no other
    settings.require("logit_scale", None)
    attention = Settings(settings.object("attn_config") | {"model_type": "mpt, attn_config"}, ATTENTION_DEFAULTS)
    attention.require("attn_type", "multihead_attention")
    attention.require("alibi", True)
    attention.require("qk_ln", None, False)
    attention.require("prefix_lm", None, False)
    shape = settings.shape(grouped=False)
    spec = ModelSpec(
        architecture="mpt",
        **shape,
        windows=settings.no_windows(),
        positions=Alibi(alibi_slopes(shape["num_heads"], attention.positive("alibi_bias_max"))),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon"), biased=False),
        feed_forward=Plain(4 * shape["hidden_size"], "gelu", biased=False),
        qkv_clip=0.0 if attention.get("clip_qkv") is None else attention.number("clip_qkv", at_least=0),
        attention_scale=attention.optional("softmax_scale"),
    )
    return Family(spec, NAMES)
