"""gpt-oss in bfloat16: sinks, windows in every other layer, biased experts with a clamped gate.

The published checkpoints are MXFP4, which is a quantization and refused as such."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Experts, Family, LayerNames, ModelSpec, RmsNormSpec, Stored, WeightNames

DEFAULTS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
NAMES = WeightNames(
    layer_names=LayerNames(
        up=Stored(("mlp.experts.gate_up_proj",), weight="", bias="_bias", transposed=True, interleaved=True),
        down=Stored(("mlp.experts.down_proj",), weight="", bias="_bias", transposed=True),
        router="mlp.router",
    )
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    settings.require("hidden_act", "silu")
    settings.require("swiglu_limit", 7.0)  # transformers reads no other
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="gpt_oss",
        **settings.shape(),
        windows=settings.windows_of(settings.layer_types(every=2)),
        positions=settings.rotary(),
        norm=RmsNormSpec(settings.epsilon("rms_norm_eps")),
        feed_forward=Experts(
            **settings.experts("num_local_experts"),
            width=settings.integer("intermediate_size"),
            renormalize=True,
            biased=True,
            clamp=settings.number("swiglu_limit"),
        ),
        qkv_bias=biased,
        out_bias=biased,
        sinks=True,
    )
    return Family(spec, NAMES)
