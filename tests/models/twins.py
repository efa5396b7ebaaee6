"""Tiny random checkpoints, one per architecture and odd setting, as transformers itself saves them.

`make_twin(name, folder)` builds one and returns its path: weights, config, generation_config, a small byte-level
tokenizer and a chat template. Weights come from a seed, so a name always means the same model.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BASE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
    "Größe, naïve, 東京, 😀 — text beyond ASCII.",
]


@dataclass(frozen=True)
class Twin:
    """A config class, what differs from `BASE`, and how it is saved."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"
    rope_style: str = "parameters"
    """`scaling`: config.json is rewritten to the older rope_theta + rope_scaling."""


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_SHORT = [1.0 + 0.05 * i for i in range(8)]
_LONG = [1.5 + 0.4 * i for i in range(8)]

TWINS: dict[str, Twin] = {
    "llama": Twin("Llama"),
    "llama-tied": Twin("Llama", {"tie_word_embeddings": True}),
    "llama-sharded": Twin("Llama", max_shard_size="100KB"),
    "llama-biases": Twin("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": Twin("Llama", {"num_key_value_heads": None}),
    "llama-mqa": Twin("Llama", {"num_key_value_heads": 1}),
    "llama-gqa8": Twin("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "llama-wide-head": Twin("Llama", {"head_dim": 32}),
    "llama-odd-head": Twin("Llama", {"head_dim": 10, "num_attention_heads": 4}),
    "llama-odd-vocab": Twin("Llama", {"vocab_size": 389, "intermediate_size": 101}),
    "llama-theta": Twin("Llama", _rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-linear": Twin("Llama", _rope("linear", factor=4.0)),
    "llama-dynamic": Twin("Llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 48}),
    "llama-yarn": Twin("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-yarn-mscale": Twin(
        "Llama",
        _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "llama-llama3": Twin(
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-longrope": Twin(
        "Llama",
        _rope("longrope", short_factor=_SHORT, long_factor=_LONG, original_max_position_embeddings=48, factor=8.0),
    ),
    "llama-old-rope": Twin("Llama", _rope("linear", factor=2.0), rope_style="scaling"),
    "qwen2": Twin("Qwen2"),
    "qwen2-tied": Twin("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Twin("Qwen2", {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}),
    "qwen2-alternating": Twin(
        "Qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen2-yarn": Twin("Qwen2", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": Twin("Qwen3", {"head_dim": 24}),
    "qwen3-biases": Twin("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": Twin(
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 23,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": Twin("Mistral", {"sliding_window": None}),
    "mistral-window": Twin("Mistral", {"sliding_window": 21}),
    "mistral-head": Twin("Mistral", {"sliding_window": None, "head_dim": 20}),
}


def make_twin(name: str, folder: Path | str) -> Path:
    """Write the checkpoint of a twin to `folder / name` and return that path; what is there already is kept."""
    path = Path(folder) / name
    if (path / "config.json").is_file():
        return path
    twin = TWINS[name]
    config = getattr(transformers, f"{twin.config}Config")(**(BASE | twin.settings))
    model = getattr(transformers, f"{twin.config}ForCausalLM")(config)
    _randomise(model, seed=sum(name.encode()))
    model.generation_config.eos_token_id = 1
    path.mkdir(parents=True, exist_ok=True)
    _tokenizer().save_pretrained(path)
    model.save_pretrained(path, max_shard_size=twin.max_shard_size)
    if twin.rope_style == "scaling":
        _age_rope(path / "config.json")
    return path


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that greedy decoding wanders instead of repeating one token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
            else:
                parameter.normal_(mean=1.0, std=0.2, generator=generator)


def _age_rope(file: Path) -> None:
    """Write rope parameters as transformers 4 did."""
    import json

    config = json.loads(file.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    config["rope_scaling"] = parameters
    file.write_text(json.dumps(config))


@cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
