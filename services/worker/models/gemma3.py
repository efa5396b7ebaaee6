"""Gemma 3 (text): windows in five of six layers with a rope of their own, norms of q and k."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, LayerNames, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}
NAMES = WeightNames(layer_names=LayerNames(mlp_norm="pre_feedforward_layernorm"))


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("use_bidirectional_attention", None, False)
    settings.require("attn_logit_softcapping", None)  # transformers reads none
    shape, biased = settings.shape(), settings.flag("attention_bias")
    types = settings.layer_types(every=settings.integer("sliding_window_pattern"))
    spec = ModelSpec(
        architecture="gemma3",
        **shape | {"max_positions": settings.integer("max_position_embeddings")},
        windows=settings.windows_of(types),
        positions=settings.rotary_by_type(types, _ropes(settings)),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps"), plus_one=True),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_activation")),
        block="sandwich",
        qkv_bias=biased,
        out_bias=biased,
        qk_norm="heads",
        attention_scale=settings.positive("query_pre_attn_scalar") ** -0.5,
        embedding_scale=shape["hidden_size"] ** 0.5,
        logit_soft_cap=settings.optional("final_logit_softcapping"),
    )
    return Family(spec, NAMES)


def _ropes(settings: Settings) -> dict[str, dict[str, Any]]:
    """By kind of layer, from `rope_parameters`, or `rope_theta`, `rope_local_base_freq` and `rope_scaling`."""
    stated, scaling = settings.object("rope_parameters"), settings.object("rope_scaling")
    if stated and not all(isinstance(each, dict) for each in stated.values()):
        raise settings.refusal("rope_parameters", "must have parameters for each of full_attention, sliding_attention")
    return {
        "full_attention": {"rope_theta": settings.number("rope_theta")} | scaling | stated.get("full_attention", {}),
        "sliding_attention": {"rope_theta": settings.number("rope_local_base_freq")}
        | stated.get("sliding_attention", {}),
    }
