"""StarCoder2: grouped heads, rope, LayerNorm, a plain feed-forward, biases everywhere."""

from typing import Any

from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

DEFAULTS = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
    "use_bias": True,
    "tie_word_embeddings": True,
}
NAMES = WeightNames(layer_names=LayerNames(up=Stored(("mlp.c_fc",)), down=Stored(("mlp.c_proj",))))


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS)
    biased = settings.flag("use_bias")
    spec = ModelSpec(
        architecture="starcoder2",
        **settings.shape(),
        windows=settings.one_window(),
        positions=settings.rotary(),
        norm=LayerNormSpec(settings.epsilon("norm_epsilon")),
        feed_forward=Plain(settings.integer("intermediate_size"), settings.activation("hidden_act"), biased),
        qkv_bias=biased,
        out_bias=biased,
    )
    return Family(spec, NAMES)
