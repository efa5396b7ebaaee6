"""OLMoE: experts in every layer, norms over all heads of q and of k together."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import EXPERT_NAMES, Experts, Family, ModelSpec, RmsNormSpec, WeightNames

DEFAULTS = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu")
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="olmoe",
        **settings.shape(),
        windows=settings.no_windows(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Experts(
            **settings.experts("num_experts"),
            width=settings.integer("intermediate_size"),
            renormalize=settings.flag("norm_topk_prob"),
        ),
        qkv_bias=biased,
        out_bias=biased,
        qk_norm="projection",
        qkv_clip=settings.optional("clip_qkv"),
    )
    return Family(spec, WeightNames(layer_names=EXPERT_NAMES))
