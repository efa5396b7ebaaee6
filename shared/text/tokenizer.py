"""Loads a checkpoint's tokenizer so that its ids equal those of transformers' AutoTokenizer, without transformers.

Three classes of transformers 5 (Llama, Qwen2, GPT2) keep only vocabulary, merges and post-processor of tokenizer.json
and build the rest themselves: where a checkpoint names one of them, so do we. Everything else is tokenizer.json as it
is. A checkpoint that has only vocab.json and merges.txt is converted for the classes whose rules are known.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from shared.text.detokenizer import TokenTexts, UnsupportedDecoderError

METASPACE = "\u2581"
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used; the message names the file and says what to do."""


class Tokenizer:
    """Text to ids and back. Stateless after construction, and safe to use from several threads."""

    def __init__(self, backend: Backend, named: dict[str, str], source: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.source = source
        self.named_tokens = named
        """The special tokens by role (`bos_token`, …), as chat templates receive them."""
        try:
            self.texts = TokenTexts(backend)
        except UnsupportedDecoderError as error:
            raise TokenizerError(f"{source}: {error} is not supported for streaming") from None
        self.size = self.texts.size
        """One more than the largest id."""
        self.longest_token_bytes = max((len(self.texts.token_bytes(i)) for i in range(self.size)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with BOS and EOS where the checkpoint adds them.

        As a batch of one: `encode` by itself holds the interpreter lock, and with it every stream, for as long as it
        takes. So it is with `decode`.
        """
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The whole text of `token_ids`."""
        [text] = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return text

    def to_json(self) -> str:
        """The whole tokenizer, as tokenizer.json spells it."""
        return self._backend.to_str()

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        eos = self.named_tokens.get("eos_token")
        return None if eos is None else self._backend.token_to_id(eos)


def end_token_ids(generation: dict[str, Any], settings: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    """What ends an answer: generation_config's, else config's, else the tokenizer's end-of-sequence tokens."""
    for declared in (generation.get("eos_token_id"), settings.get("eos_token_id"), tokenizer.eos_token_id):
        if isinstance(declared, int):
            return frozenset((declared,))
        if isinstance(declared, list) and declared:
            return frozenset(declared)
    return frozenset()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (or of a tokenizer.json itself). Raises TokenizerError."""
    if folder.is_file():
        return Tokenizer(_from_file(folder), _Settings({}, {}).named, str(folder))
    try:
        return _load(folder)
    except TokenizerError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # valid JSON of another shape than expected
        raise TokenizerError(f"{folder}: the tokenizer's JSON files are malformed ({error!r})") from None


def _load(folder: Path) -> Tokenizer:
    settings = _Settings(_json(folder / "tokenizer_config.json"), _json(folder / "special_tokens_map.json"))
    layout = _layout(settings.config.get("tokenizer_class"), _json(folder / "config.json").get("model_type"))
    file = folder / "tokenizer.json"
    if file.is_file():
        backend = _from_file(file) if layout is None else _rebuilt(file, layout, settings)
    else:
        backend = _converted(folder, layout, settings)
        file = folder / "vocab.json"
    _add_missing_tokens(backend, settings)
    if not (folder / "tokenizer.json").is_file() or backend.post_processor is None:
        _set_post_processor(backend, settings, honour_flags=file.name == "vocab.json")
    return Tokenizer(backend, settings.named, str(file))


class _Settings:
    """tokenizer_config.json, and special_tokens_map.json where the former brings no `added_tokens_decoder`."""

    def __init__(self, config: dict[str, Any], special_map: dict[str, Any]) -> None:
        self.config = dict(config)
        self.added = {
            int(token_id): _added_token(token) for token_id, token in config.get("added_tokens_decoder", {}).items()
        }
        if "added_tokens_decoder" not in config:
            self.config.update(special_map)
        if "additional_special_tokens" in self.config:
            self.config.setdefault("extra_special_tokens", self.config["additional_special_tokens"])

    def default(self, **tokens: str) -> None:
        """What a tokenizer class sets where the checkpoint is silent."""
        for role, token in tokens.items():
            self.config.setdefault(role, token)

    @property
    def named(self) -> dict[str, str]:
        roles = [role for role in self.config if role in NAMED_TOKENS or role.endswith("_token")]
        found = {role: _content(self.config[role]) for role in roles}
        return {role: content for role, content in found.items() if content is not None}

    @property
    def specials(self) -> list[AddedToken]:
        """Named tokens first, in transformers' order, then model-specific and extra ones."""
        named = self.named
        ordered = [role for role in NAMED_TOKENS if role in named]
        ordered += [role for role in named if role not in NAMED_TOKENS]
        extra = self.config.get("extra_special_tokens") or []
        values = [self.config[role] for role in ordered] + list(extra.values() if isinstance(extra, dict) else extra)
        return [_added_token(value, special=True) for value in values if _content(value) is not None]


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        return token.get("content")
    return token if isinstance(token, str) else None


def _added_token(token: Any, special: bool | None = None) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=bool(special), normalized=not special)
    known = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
    return AddedToken(token["content"], **known, special=token.get("special", False) if special is None else special)


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None


def _from_file(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"cannot read {path}: {error}") from None


Layout = Callable[[dict[str, int], list[tuple[str, str]], _Settings], Backend]


def _llama(vocab: dict[str, int], merges: list[tuple[str, str]], settings: _Settings) -> Backend:
    settings.default(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    prefix = settings.config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None))
    scheme = "never" if not prefix else "always" if settings.config.get("legacy", False) else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if prefix else []))
    return backend


def _qwen2(vocab: dict[str, int], merges: list[tuple[str, str]], settings: _Settings) -> Backend:
    settings.default(unk_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        dropout=None,
        unk_token=None,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
        byte_fallback=False,
    )
    backend = Backend(model)
    prefix = bool(settings.config.get("add_prefix_space"))
    split = pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated", invert=False)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(vocab: dict[str, int], merges: list[tuple[str, str]], settings: _Settings) -> Backend:
    settings.default(unk_token="<|endoftext|>", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        dropout=None,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
    )
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return backend


LAYOUTS: dict[str, Layout] = {"LlamaTokenizer": _llama, "Qwen2Tokenizer": _qwen2, "GPT2Tokenizer": _gpt2}
CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
CLASS_FORCED_BY_MODEL = frozenset({"qwen2"})
"""Model types whose own class wins over what tokenizer_config.json says."""
PLAIN_MODELS = frozenset({"mistral", "ministral", "mistral3", "mixtral"})
"""Model types whose tokenizer.json is taken as it is, whatever class is named."""


def _layout(named_class: str | None, model_type: str | None) -> Layout | None:
    """The class that AutoTokenizer of transformers 5 would choose; None: tokenizer.json as it is."""
    if model_type in PLAIN_MODELS:
        return None
    registered = CLASS_OF_MODEL.get(model_type or "")
    chosen = (named_class or registered or "").removesuffix("Fast")
    if registered and model_type in CLASS_FORCED_BY_MODEL:
        chosen = registered
    return LAYOUTS.get(chosen)


def _rebuilt(file: Path, layout: Layout, settings: _Settings) -> Backend:
    """tokenizer.json's vocabulary, merges and post-processor under the class's own rules."""
    data = _json(file)
    model = data.get("model", {})
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        return _from_file(file)
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    merges = [(left, right) for left, right in pairs]
    added = sorted(data.get("added_tokens", []), key=lambda token: token["id"])
    backend = layout(dict(model["vocab"]), merges, settings)
    if not settings.added:
        settings.added = {token["id"]: _added_token(token) for token in added}
    if data.get("post_processor") is not None:
        empty = {**data, "model": {**model, "vocab": {}, "merges": []}, "added_tokens": []}
        backend.post_processor = Backend.from_str(json.dumps(empty)).post_processor
    return backend


def _converted(folder: Path, layout: Layout | None, settings: _Settings) -> Backend:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if not (vocab_file.is_file() and merges_file.is_file()):
        present = [name for name in ("tokenizer.model", "tekken.json", "vocab.txt") if (folder / name).is_file()]
        found = f" ({present[0]} is not read)" if present else ""
        raise TokenizerError(
            f"{folder} has no tokenizer.json{found}: add one (AutoTokenizer.from_pretrained(…).save_pretrained(…) "
            "writes it) or name another folder with --tokenizer"
        )
    if layout not in (_qwen2, _gpt2):
        raise TokenizerError(
            f"{folder} has vocab.json and merges.txt but no tokenizer.json, and its tokenizer_class "
            f"{settings.config.get('tokenizer_class')!r} does not say how to read them: convert it with transformers"
        )
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return layout(_json(vocab_file), [(pair[0], pair[1]) for pair in merges], settings)


def _add_missing_tokens(backend: Backend, settings: _Settings) -> None:
    """Added and special tokens of the configuration that the file does not have."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(settings.added.items()):
        if token.content not in known:
            backend.add_tokens([token])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in settings.specials:
        if token.content not in known or not known[token.content].special:
            token = known.get(token.content, token)
            token.special = True
            backend.add_special_tokens([token])


def _set_post_processor(backend: Backend, settings: _Settings, *, honour_flags: bool) -> None:
    named = settings.named
    flags = settings.config if honour_flags else {}
    bos = named.get("bos_token") if flags.get("add_bos_token") else None
    eos = named.get("eos_token") if flags.get("add_eos_token") else None
    template = " ".join([*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])])
    specials = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=specials
    )
