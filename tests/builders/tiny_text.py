"""A checkpoint folder without weights: a byte-level tokenizer, a chat template, the small JSON files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog. stop words end an answer.",
    "héllo wörld, 你好, 世界 🙂 🙃",
] * 4
SPECIALS = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_MODEL_LEN = 512


@cache
def byte_level_json() -> str:
    """A byte-level BPE tokenizer of 400 tokens that adds BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend.to_str()


def write_tiny_model(folder: Path, *, generation: dict[str, Any] | None = None, chat: bool = True) -> Path:
    """Fills `folder` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level_json())
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "llama", "vocab_size": 400, "max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return folder
