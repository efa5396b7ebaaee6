"""Gemma 2: windows in every other layer, norms on both sides of each half, soft caps on scores and logits."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, LayerNames, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
CAPS = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
"""Where the key is left out; an explicit null is no cap."""
NAMES = WeightNames(layer_names=LayerNames(mlp_norm="pre_feedforward_layernorm"))


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(CAPS | config, DEFAULTS)
    settings.require("use_bidirectional_attention", None, False)
    shape, biased = settings.shape(), settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="gemma2",
        **shape,
        windows=settings.windows_of(settings.layer_types(every=2)),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps"), plus_one=True),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_activation")),
        block="sandwich",
        qkv_bias=biased,
        out_bias=biased,
        attention_scale=settings.positive("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=settings.optional("attn_logit_softcapping"),
        embedding_scale=shape["hidden_size"] ** 0.5,
        logit_soft_cap=settings.optional("final_logit_softcapping"),
    )
    return Family(spec, NAMES)
