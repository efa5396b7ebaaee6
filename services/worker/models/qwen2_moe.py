"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one that every token uses, behind a gate of its own."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import EXPERT_NAMES, Experts, Family, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "qkv_bias": True,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu")
    settings.require("decoder_sparse_step", 1)
    settings.require("mlp_only_layers", None, [])
    settings.require("use_sliding_window", None, False)
    spec = ModelSpec(
        architecture="qwen2_moe",
        **settings.shape(),
        windows=settings.no_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Experts(
            **settings.experts("num_experts"),
            width=settings.integer("moe_intermediate_size"),
            renormalize=settings.flag("norm_topk_prob"),
            shared_width=settings.integer("shared_expert_intermediate_size"),
        ),
        qkv_bias=settings.flag("qkv_bias"),
    )
    return Family(spec, WeightNames(layer_names=EXPERT_NAMES))
