"""Falcon 7B (one KV head, attention and feed-forward of one norm), 40B (groups, a norm for each) and RW (ALiBi).

Falcon scales ALiBi with the scores. transformers rounds its products to bfloat16, which tells distances beyond 256
less and less apart; here they are exact."""

from typing import Any

import msgspec

from services.worker.layers.positions import Alibi, alibi_slopes
from services.worker.models.settings import Settings
from services.worker.models.spec import Block, Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {"hidden_size": "n_embed", "num_key_value_heads": "num_kv_heads"}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "activation": "gelu",
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
QKV = Stored(("self_attention.query_key_value",), interleaved=True)
LAYER = LayerNames(
    qkv=QKV,
    out=Stored(("self_attention.dense",)),
    up=Stored(("mlp.dense_h_to_4h",)),
    down=Stored(("mlp.dense_4h_to_h",)),
)
TWO_NORMS = msgspec.structs.replace(LAYER, attention_norm="ln_attn", mlp_norm="ln_mlp")


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    shape, biased, block = settings.shape(), settings.flag("bias"), _block(settings)
    if not settings.flag("new_decoder_architecture"):
        shape["num_kv_heads"] = 1 if settings.flag("multi_query") else shape["num_heads"]
    hidden, scale = shape["hidden_size"], shape["head_dim"] ** -0.5
    width = 4 * hidden if settings.get("ffn_hidden_size") is None else settings.integer("ffn_hidden_size")
    alibi = Alibi(tuple(slope * scale for slope in alibi_slopes(shape["num_heads"])))
    spec = ModelSpec(
        architecture="falcon",
        **shape,
        windows=settings.no_windows(),
        positions=alibi if settings.flag("alibi") else settings.rotary(),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon")),
        feed_forward=Plain(width, settings.activation("activation"), biased),
        block=block,
        qkv_bias=biased,
        out_bias=biased,
    )
    layer = TWO_NORMS if block == "parallel_two_norms" else LAYER
    names = WeightNames("transformer.", "word_embeddings", final_norm="ln_f", layer="h.{}.", layer_names=layer)
    return Family(spec, names)


def _block(settings: Settings) -> Block:
    new, parallel = settings.flag("new_decoder_architecture"), settings.flag("parallel_attn")
    if new and not parallel:
        raise settings.refusal("parallel_attn", "is not implemented with new_decoder_architecture")
    settings.require("num_ln_in_parallel_attn", None, 1, 2)
    stated = settings.get("num_ln_in_parallel_attn")
    if not new and stated == 2:
        raise settings.refusal("num_ln_in_parallel_attn", "is not implemented without new_decoder_architecture")
    if not parallel:
        return "pre_norm"
    return "parallel_two_norms" if new and stated in (None, 2) else "parallel"
