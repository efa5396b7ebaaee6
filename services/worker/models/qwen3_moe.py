"""Qwen3-MoE: Qwen3 with experts in every layer."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import EXPERT_NAMES, Experts, Family, ModelSpec, RmsNormSpec, WeightNames

SPELLINGS = {"num_experts": "num_local_experts"}
DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    settings.require("hidden_act", "silu")
    settings.require("decoder_sparse_step", 1)
    settings.require("mlp_only_layers", None, [])
    biased, slides = settings.flag("attention_bias"), settings.flag("use_sliding_window")
    spec = ModelSpec(
        architecture="qwen3_moe",
        **settings.shape(),
        windows=settings.one_window() if slides else settings.no_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Experts(
            **settings.experts("num_experts"),
            width=settings.integer("moe_intermediate_size"),
            renormalize=settings.flag("norm_topk_prob"),
        ),
        qkv_bias=biased,
        out_bias=biased,
        qk_norm="heads",
    )
    return Family(spec, WeightNames(layer_names=EXPERT_NAMES))
