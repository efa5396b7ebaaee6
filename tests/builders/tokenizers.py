"""Small tokenizers of every kind that checkpoints bring, as checkpoint folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

METASPACE = "\u2581"
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b  # sums\n",
    "unhappiness is not unfriendly; it's what they've said, isn't it?",
    "héllo wörld 你好 世界 🙂",
] * 8
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]


def _bos(token: str = "<s>", token_id: int = 1) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=[*SPECIALS, "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = _bos()
    return backend


def _sentencepiece_bpe() -> models.BPE:
    """Pieces with a Metaspace mark, and a token for every byte."""
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIALS + BYTES, show_progress=False)
    draft.train_from_iterator(CORPUS[:3], trainer)
    state = json.loads(draft.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    return models.BPE(vocab=state["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def _llama_decoder() -> decoders.Decoder:
    parts = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(parts)


def llama2() -> Tokenizer:
    """As Llama 2's tokenizer.json: marks made by normalizers."""
    backend = Tokenizer(_sentencepiece_bpe())
    parts = [normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)]
    backend.normalizer = normalizers.Sequence(parts)
    backend.decoder = _llama_decoder()
    backend.post_processor = _bos()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return backend


def gemma() -> Tokenizer:
    """As Gemma's: no leading space is made or stripped."""
    backend = Tokenizer(_sentencepiece_bpe())
    backend.normalizer = normalizers.Replace(" ", METASPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = _bos()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return backend


def unigram() -> Tokenizer:
    """As XLM-R and T5: Unigram behind Metaspace."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.Metaspace(replacement=METASPACE, prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return backend


def wordpiece() -> Tokenizer:
    """As BERT."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    pair = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    return backend


def without_decoder() -> Tokenizer:
    """Tokens joined by spaces."""
    backend = byte_level()
    backend.decoder = None
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama2": llama2,
    "gemma": gemma,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "without_decoder": without_decoder,
}


def write_tokenizer(
    folder: Path,
    backend: Tokenizer,
    *,
    model_type: str = "llama",
    split_files: bool = False,
    special_map: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint folder as far as tokenizers go; `split_files` leaves vocab.json and merges.txt only."""
    folder.mkdir(parents=True, exist_ok=True)
    if split_files:
        model = json.loads(backend.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    else:
        backend.save(str(folder / "tokenizer.json"))
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 500}))
    return folder
