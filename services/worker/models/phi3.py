"""Phi-3 and Phi-4: Llama whose merged projections are kept merged, with longrope in the long ones.

ops/decisions/length-dependent-rope.md says what longrope does beyond the trained length."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, Gated, LayerNames, ModelSpec, RmsNormSpec, Stored, WeightNames

DEFAULTS = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
NAMES = WeightNames(
    layer_names=LayerNames(qkv=Stored(("self_attn.qkv_proj",)), up=Stored(("mlp.gate_up_proj",))),
)
FORMER_LONGROPE = ("su", "yarn")
"""What the first checkpoints called it."""


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(_renamed(config), DEFAULTS)
    spec = ModelSpec(
        architecture="phi3",
        **settings.shape(),
        windows=settings.one_window(),
        positions=settings.rotary(partial=1.0),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Gated(settings.integer("intermediate_size"), settings.activation("hidden_act")),
    )
    return Family(spec, NAMES)


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    stated = config.get("rope_scaling")
    if not isinstance(stated, dict) or stated.get("rope_type", stated.get("type")) not in FORMER_LONGROPE:
        return config
    return config | {"rope_scaling": stated | {"rope_type": "longrope"}}
