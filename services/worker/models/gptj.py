"""GPT-J: rope on pairs that lie side by side, attention and feed-forward of one norm, a bias on the head."""

from typing import Any

from services.worker.layers.positions import DefaultRope, Rotary
from services.worker.models import gpt2
from services.worker.models.settings import Settings
from services.worker.models.spec import Family, LayerNames, LayerNormSpec, ModelSpec, Plain, Stored, WeightNames

DEFAULTS = {
    "n_positions": 2048,
    "rotary_dim": 64,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
THETA = 10_000.0
NAMES = WeightNames(
    base="transformer.",
    embedding="wte",
    final_norm="ln_f",
    layer="h.{}.",
    layer_names=LayerNames(
        attention_norm="ln_1",
        qkv=Stored(("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        out=Stored(("attn.out_proj",)),
        up=Stored(("mlp.fc_in",)),
        down=Stored(("mlp.fc_out",)),
    ),
    ignored=("attn.bias", "attn.masked_bias", "attn.embed_positions"),
)


def translate(config: dict[str, Any]) -> Family:
    settings = Settings(config, DEFAULTS, gpt2.SPELLINGS)
    shape, rotary_dim = settings.shape(grouped=False), settings.integer("rotary_dim")
    if rotary_dim % 2 or rotary_dim > shape["head_dim"]:
        raise settings.refusal("rotary_dim", f"must be even and at most {shape['head_dim']}, the width of a head")
    width = 4 * shape["hidden_size"] if settings.get("n_inner") is None else settings.integer("n_inner")
    spec = ModelSpec(
        architecture="gptj",
        **shape,
        windows=settings.no_windows(),
        positions=Rotary((DefaultRope(THETA),) * shape["num_layers"], rotary_dim, interleaved=True),
        norm=LayerNormSpec(settings.epsilon("layer_norm_epsilon")),
        feed_forward=Plain(width, settings.activation("activation_function")),
        block="parallel",
        head_bias=True,
    )
    return Family(spec, NAMES)
