"""BLOOM: ALiBi, and a norm of the embeddings. Its configuration states no longest context but `seq_length`."""

from typing import Any

from services.worker.layers.positions import Alibi, alibi_slopes
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {
    "hidden_size": "n_embed",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "seq_length",
}
DEFAULTS = {"max_position_embeddings": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
NAMES = WeightNames(
    base="transformer.",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    layer="h.{}.",
    layer_names=LayerNames(
        qkv=Stored(("self_attention.query_key_value",), interleaved=True),
        out=Stored(("self_attention.dense",)),
        up=Stored(("mlp.dense_h_to_4h",)),
        down=Stored(("mlp.dense_4h_to_h",)),
    ),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    settings.require("apply_residual_connection_post_layernorm", None, False)
    shape = settings.shape(grouped=False)
    spec = ModelSpec(
        architecture="bloom",
        **shape,
        windows=settings.no_windows(),
        positions=Alibi(alibi_slopes(shape["num_heads"])),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon")),
        feed_forward=Plain(4 * shape["hidden_size"], "gelu_tanh"),
        qkv_bias=True,
        out_bias=True,
        embedding_norm=True,
    )
    return Family(spec, NAMES)
