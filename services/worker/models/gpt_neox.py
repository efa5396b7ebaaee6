"""GPT-NeoX and Pythia: rope on a quarter of each head, attention and feed-forward side by side."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

SPELLINGS = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
}
NAMES = WeightNames(
    base="gpt_neox.",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    layer_names=LayerNames(
        qkv=Stored(("attention.query_key_value",), interleaved=True),
        out=Stored(("attention.dense",)),
        up=Stored(("mlp.dense_h_to_4h",)),
        down=Stored(("mlp.dense_4h_to_h",)),
    ),
    ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, SPELLINGS)
    biased = settings.flag("attention_bias")
    spec = ModelSpec(
        architecture="gpt_neox",
        **settings.shape(grouped=False),
        windows=settings.no_windows(),
        positions=settings.rotary(partial=0.25),
        norm=LayerNormSpec(settings.epsilon("layer_norm_eps")),
        feed_forward=Plain(settings.integer("intermediate_size"), settings.activation("hidden_act")),
        block="parallel_two_norms" if settings.flag("use_parallel_residual") else "pre_norm",
        qkv_bias=biased,
        out_bias=biased,
    )
    return Family(spec, NAMES)
