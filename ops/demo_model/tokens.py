"""Documents as token ids: the endless stream that training reads, and the held-out windows that it never sees."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from ops.demo_model import corpus
from ops.demo_model.settings import Settings

Ids = np.ndarray  # one-dimensional, uint16

CHARACTERS_PER_TOKEN = 2.8  # a low estimate, for cutting files before they are tokenized


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents: training's by weight, and the held-out ones by kind."""

    library: list[Ids]
    tests: list[Ids]
    chat: list[Ids]
    held_out: dict[str, Ids]
    token_bytes: Ids  # bytes of text that each token id stands for

    def size(self) -> dict[str, int]:
        """Count the tokens of each part, each document once."""
        parts = {"library": self.library, "tests": self.tests, "chat": self.chat}
        counted = {name: sum(map(len, documents)) for name, documents in parts.items()}
        return counted | {f"held_out_{name}": len(ids) for name, ids in self.held_out.items()}


def tokenizer_texts(sources: list[corpus.Source]) -> list[str]:
    """Return what the tokenizer learns from: the library's training files."""
    return [source.text for source in sources if not source.is_test and not source.held_out]


def build(sources: list[corpus.Source], tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Corpus:
    """Tokenize every document and every chat."""
    draw = random.Random(settings.seed)

    def documents(is_test: bool, held_out: bool) -> list[Ids]:
        chosen = [s for s in sources if s.is_test == is_test and s.held_out == held_out]
        if is_test:
            chosen = [s for s in chosen if draw.random() < settings.test_share]
        return _documents(chosen, tokenizer, settings)

    def chats(held_out: bool, passes: int) -> list[Ids]:
        chosen = [s for s in sources if not s.is_test and s.held_out == held_out]
        return _chats(chosen, tokenizer, draw, passes, settings.chat_tokens)

    held_out = {"library": documents(False, True), "tests": documents(True, True), "chat": chats(True, 1)}
    return Corpus(
        library=documents(False, False),
        tests=documents(True, False),
        chat=chats(False, settings.chat_passes),
        held_out={kind: np.concatenate(ids) for kind, ids in held_out.items()},
        token_bytes=_token_bytes(tokenizer),
    )


def _documents(sources: list[corpus.Source], tokenizer: PreTrainedTokenizerFast, settings: Settings) -> list[Ids]:
    """Tokenize files as documents: BOS, text, EOS."""
    limit = int(settings.document_tokens * CHARACTERS_PER_TOKEN)
    texts = [piece for source in sources for piece in corpus.pieces(source.text, limit)]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return [np.array([*item.ids, tokenizer.eos_token_id], dtype=np.uint16) for item in encoded]


def _chats(
    sources: list[corpus.Source], tokenizer: PreTrainedTokenizerFast, draw: random.Random, passes: int, limit: int
) -> list[Ids]:
    """Tokenize the functions of files as chats, without those of more than `limit` tokens."""
    found = [function for source in sources for function in corpus.functions(source)]
    asked = [chat.messages() for function in found for chat in corpus.chats(function, draw, passes)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in asked]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(item.ids, dtype=np.uint16) for item in encoded if len(item.ids) <= limit]


def _token_bytes(tokenizer: PreTrainedTokenizerFast) -> Ids:
    """Count the bytes of each token: a byte-level token spells each byte as one character."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if index in special else len(name) for index, name in enumerate(names)], dtype=np.uint16)


class Stream:
    """The training documents without end, each epoch shuffled anew, one after another without gaps."""

    def __init__(self, data: Corpus, settings: Settings, epoch: int = 0) -> None:
        self._documents = data.library * settings.library_passes + data.tests + data.chat
        self._seed = settings.seed
        self._rest = np.empty(0, dtype=np.uint16)
        self.epoch = epoch

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and the tokens that follow them, both [rows, length]."""
        needed = rows * length + 1
        if len(self._rest) < needed:
            self._rest = np.concatenate([self._rest, self._shuffled()])
        taken, self._rest = self._rest[:needed].astype(np.int64), self._rest[needed - 1 :]
        ids = torch.from_numpy(taken)
        return ids[:-1].view(rows, length), ids[1:].view(rows, length)

    def _shuffled(self) -> Ids:
        """Concatenate the documents in this epoch's order."""
        order = np.random.default_rng([self._seed, self.epoch]).permutation(len(self._documents))
        self.epoch += 1
        return np.concatenate([self._documents[index] for index in order])


def windows(ids: Ids, length: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut at most `limit` tokens into inputs and targets, both [rows, length]; the last partial window is left out."""
    rows = min(limit, len(ids) - 1) // length
    taken = torch.from_numpy(ids[: rows * length + 1].astype(np.int64))
    return taken[:-1].view(rows, length), taken[1:].view(rows, length)
