"""Token ids to text, one token at a time, never sending half a character.

A tokenizer's decoder (ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, WordPiece, or a sequence of them) is
compiled into stages that consume tokens one by one. The concatenated pieces equal the tokenizer's own decode of the
whole, at a constant cost per token. One difference is chosen: in a run of byte tokens (`<0xE4>`) that turns invalid,
`tokenizers` replaces the whole run; characters that were complete before the fault have been sent, and stay.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 8
"""Prompt tokens that prime a detokenizer, so that a leading space is kept and a split character is completed."""
CONTEXT_SCAN_TOKENS = 64


class UnsupportedDecoderError(ValueError):
    """A decoder that cannot be run token by token; the message names it."""


class Stage(Protocol):
    """Consumes the output of the stage before it."""

    def push(self, text: str) -> Sequence[str]: ...

    def end(self) -> Sequence[str]: ...


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    missing = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + i): byte for i, byte in enumerate(missing)}


BYTE_OF_CHAR = _byte_table()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def fallback_byte(token: str) -> int | None:
    """0xE4 for `<0xE4>`, None for any other token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


class ByteLevelStage:
    """Bytes joined across tokens, decoded as UTF-8 with U+FFFD for what is not."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, text: str) -> Sequence[str]:
        return (self._decoder.decode(byte_level_bytes(text)),)

    def end(self) -> Sequence[str]:
        return (self._decoder.decode(b"", True),)


class ByteFallbackStage:
    """Runs of `<0xNN>` tokens become characters as soon as they are complete."""

    def __init__(self) -> None:
        self._pending = b""
        self._broken = False

    def push(self, text: str) -> Sequence[str]:
        byte = fallback_byte(text)
        if byte is None:
            return (*self.end(), text)
        if self._broken:
            return (REPLACEMENT,)
        self._pending += bytes([byte])
        try:
            char = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ()
            self._broken = True
            return self._give_up()
        self._pending = b""
        return (char,)

    def end(self) -> Sequence[str]:
        self._broken = False
        return self._give_up()

    def _give_up(self) -> Sequence[str]:
        lost, self._pending = len(self._pending), b""
        return (REPLACEMENT * lost,) if lost else ()


class MapStage:
    """A function of one token and of whether it is the first."""

    def __init__(self, apply: Callable[[str, bool], str]) -> None:
        self._apply = apply
        self._first = True

    def push(self, text: str) -> Sequence[str]:
        first, self._first = self._first, False
        return (self._apply(text, first),)

    def end(self) -> Sequence[str]:
        return ()


class StripStage:
    """Strips a whole text that arrives in pieces: up to `left` characters before it, `right` after it."""

    def __init__(self, content: str, left: int, right: int) -> None:
        self._content = content
        self._left = left
        self._right = right
        self._held = ""

    def push(self, text: str) -> Sequence[str]:
        while self._left and text:
            if text[0] != self._content:
                self._left = 0
                break
            text, self._left = text[1:], self._left - 1
        if not self._right:
            return (text,)
        text = self._held + text
        tail = min(self._right, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - tail :]
        return (text[: len(text) - tail],)

    def end(self) -> Sequence[str]:
        return ()


def _strip_token(content: str, left: int, right: int) -> Callable[[str, bool], str]:
    def apply(token: str, first: bool) -> str:
        start = 0
        while start < left and token[start : start + 1] == content:
            start += 1
        stop = len(token)
        while len(token) - stop < right and stop > start and token[stop - 1] == content:
            stop -= 1
        return token[start:stop]

    return apply


def _metaspace(spec: dict[str, Any]) -> Callable[[str, bool], str]:
    mark = spec["replacement"]
    drops_first = spec.get("prepend_scheme", "always") != "never"
    return lambda token, first: token.replace(mark, "" if first and drops_first else " ")


WORDPIECE_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _wordpiece(spec: dict[str, Any]) -> Callable[[str, bool], str]:
    prefix, cleanup = spec["prefix"], spec["cleanup"]

    def apply(token: str, first: bool) -> str:
        if not first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
        if cleanup:
            for found, instead in WORDPIECE_CLEANUP:
                token = token.replace(found, instead)
        return token

    return apply


def _replace(spec: dict[str, Any], merged: bool) -> Callable[[str, bool], str]:
    pattern, content = spec["pattern"], spec["content"]
    if "String" in pattern:
        found = pattern["String"]
        if merged and len(found) != 1:
            raise UnsupportedDecoderError("a Replace of several characters after a Fuse")
        return lambda token, first: token.replace(found, content)
    if merged:
        raise UnsupportedDecoderError("a Replace by regular expression after a Fuse")
    compiled = re.compile(pattern["Regex"])
    return lambda token, first: compiled.sub(lambda _: content, token)


MERGING = frozenset({"Fuse", "ByteLevel"})
"""After these a text is one piece: what follows sees characters, not tokens."""

MakeStage = Callable[[], Stage]


def compile_decoder(spec: dict[str, Any] | None) -> list[MakeStage]:
    """Factories of the stages of one stream. Raises UnsupportedDecoderError by name."""
    if spec is None:
        return [lambda: MapStage(lambda token, first: token if first else " " + token)]
    makes: list[MakeStage] = []
    merged = False
    for part in _flatten(spec):
        if part["type"] != "Fuse":
            makes.append(_stage(part, merged))
        merged = merged or part["type"] in MERGING
    return makes


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flatten(inner)]


def _stage(spec: dict[str, Any], merged: bool) -> MakeStage:
    kind = spec["type"]
    if kind == "Replace":
        apply = _replace(spec, merged)
        return lambda: MapStage(apply)
    if kind == "Strip":
        edges = (spec["content"], spec["start"], spec["stop"])
        return (lambda: StripStage(*edges)) if merged else (lambda: MapStage(_strip_token(*edges)))
    if merged:
        raise UnsupportedDecoderError(f"{kind} after a Fuse")
    if kind == "ByteLevel":
        return ByteLevelStage
    if kind == "ByteFallback":
        return ByteFallbackStage
    maps = {"Metaspace": _metaspace, "WordPiece": _wordpiece}
    if kind not in maps:
        raise UnsupportedDecoderError(f"the decoder {kind}")
    apply = maps[kind](spec)
    return lambda: MapStage(apply)


class TokenTexts:
    """What each token id stands for in one tokenizer. Shared by all its detokenizers; read-only."""

    def __init__(self, backend: Backend) -> None:
        state = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self._stages = compile_decoder(state)
        self._byte_level = state is not None and any(part["type"] == "ByteLevel" for part in _flatten(state))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self._tokens: list[str | None] = [None] * self.size
        for token, token_id in vocabulary.items():
            self._tokens[token_id] = token
        added = backend.get_added_tokens_decoder()
        for token_id, entry in added.items():
            self._tokens[token_id] = entry.content
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        specials = {token.content for token in added.values() if token.special}
        self._visible = [None if token in specials else token for token in self._tokens]
        self._showing: dict[frozenset[int], list[str | None]] = {frozenset(): self._visible}

    def visible(self, token_id: int) -> str | None:
        """The token's string in the vocabulary; None for special and unknown ids, which have no text."""
        return self._visible[token_id] if 0 <= token_id < self.size else None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for on its own; a special token stands for its name."""
        token = self._tokens[token_id] if 0 <= token_id < self.size else None
        if token is None:
            return b""
        if self._byte_level:
            return byte_level_bytes(token)
        byte = fallback_byte(token)
        return bytes([byte]) if byte is not None else token.replace("\u2581", " ").encode()

    def stream(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> "Detokenizer":
        """A detokenizer for what follows `prompt_ids`. Special tokens have no text but for those `shown`, or all have
        their names. For each set of `shown` a list of the vocabulary is kept: let there be few."""
        strings = self._strings(shown) if skip_special_tokens else self._tokens
        detokenizer = Detokenizer(strings, [make() for make in self._stages])
        for token_id in self._context(prompt_ids):
            detokenizer.push(token_id)
        return detokenizer

    def _strings(self, shown: frozenset[int]) -> Sequence[str | None]:
        if shown not in self._showing:
            self._showing[shown] = [
                self._tokens[token_id] if token_id in shown else visible
                for token_id, visible in enumerate(self._visible)
            ]
        return self._showing[shown]

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        tail = prompt_ids[-CONTEXT_SCAN_TOKENS:]
        return [token_id for token_id in tail if self.visible(token_id) is not None][-CONTEXT_TOKENS:]


class Detokenizer:
    """One sample's text. `push` returns the text that the token completed, `finish` what was still held."""

    __slots__ = ("_stages", "_strings")

    def __init__(self, strings: Sequence[str | None], stages: list[Stage]) -> None:
        """`strings` are the vocabulary's by id, None where a token has no text."""
        self._strings = strings
        self._stages = stages

    def push(self, token_id: int) -> str:
        token = self._strings[token_id] if 0 <= token_id < len(self._strings) else None
        if token is None:
            return ""
        pieces: Sequence[str] = (token,)
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)

    def finish(self) -> str:
        pieces: list[str] = []
        for stage in self._stages:
            pieces = [out for piece in pieces for out in stage.push(piece)] + list(stage.end())
        return "".join(pieces)
