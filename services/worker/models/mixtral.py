"""Mixtral: Mistral with eight experts of which each token uses two."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Experts, Family, LayerNames, ModelSpec, RmsNormSpec, Stored, WeightNames

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1_000_000.0,
}
NAMES = WeightNames(
    layer_names=LayerNames(
        up=Stored(("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3")),
        down=Stored(("block_sparse_moe.experts.{}.w2",)),
        router="block_sparse_moe.gate",
    )
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu")
    spec = ModelSpec(
        architecture="mixtral",
        **settings.shape(),
        windows=settings.one_window(),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Experts(
            **settings.experts("num_local_experts"), width=settings.integer("intermediate_size"), renormalize=True
        ),
    )
    return Family(spec, NAMES)
