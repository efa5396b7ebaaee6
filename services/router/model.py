"""The model as the edge knows it: names, limits and defaults, read from a checkpoint's small files; no weights."""

from pathlib import Path
from typing import Any

import msgspec
import structlog

from services.router.limits import RANGES, Limits
from services.router.parsing.families import THINKING, TOOL_CALLS, ToolCalls, thinking_of, tool_calls_of
from services.router.parsing.thinking import Thinks
from shared.checkpoint import CheckpointError, locate, open_checkpoint, read_config
from shared.config import RouterConfig
from shared.outcome import refuse
from shared.text.chat import ChatTemplate, load_chat_template
from shared.text.tokenizer import Tokenizer, TokenizerError, end_token_ids, load_tokenizer

log = structlog.get_logger("model")

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""How families spell the longest context."""
UNSTATED_LENGTH = 2**31 - 1


class ModelError(ValueError):
    """A checkpoint that cannot be served; the message names the file and says what to do."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the checkpoint's generation_config says; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """`names` are what clients may call it, the first being its own; `fingerprint` names the checkpoint, empty where
    the weights are not on this machine. `max_model_len` is what the configuration states, for as long as no worker has
    said what it takes."""

    names: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    dtype: str
    fingerprint: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: Defaults
    eos_token_ids: frozenset[int]
    tool_calls: ToolCalls | None = None
    """How it calls tools, where that is understood."""
    thinking: Thinks | None = None
    """How it marks its reasoning, where it does."""

    def check_name(self, name: str) -> None:
        """Refuses a name that is not served."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise refuse("model_not_found", f"there is no model {name[:128]!r} here; served: {known}")

    @property
    def limits(self) -> Limits:
        return Limits(vocab_size=self.vocab_size)


def load_model(config: RouterConfig) -> ServedModel:
    """Blocking: reads files, and downloads a hub id. Raises ModelError or CheckpointError, naming what is wrong."""
    folder = locate(config.model, revision=config.revision or None)
    try:
        words = _tokenizer_folder(config, folder)
        tokenizer = load_tokenizer(words)
        template = load_chat_template(words if words.is_dir() else folder, tokenizer, config.chat_template)
    except TokenizerError as error:
        raise ModelError(str(error)) from None
    settings, generation, fingerprint = _read(folder)
    text = settings.get("text_config", settings)
    tool_calls, thinking = _parsers(config, template)
    return ServedModel(
        names=config.served_model_name or (_own_name(config.model),),
        vocab_size=_positive(text, "vocab_size", folder),
        max_model_len=_stated_length(text, folder),
        dtype=str(settings.get("dtype") or settings.get("torch_dtype") or "float32"),
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        chat_template=template,
        defaults=_defaults(generation, folder),
        eos_token_ids=end_token_ids(generation, settings, tokenizer),
        tool_calls=TOOL_CALLS.get(tool_calls),
        thinking=THINKING.get(thinking),
    )


def _parsers(config: RouterConfig, template: ChatTemplate | None) -> tuple[str, str]:
    """The names of the families that the flags name, or the chat template speaks; "none" for neither."""
    tool_calls, thinking = config.tool_call_parser, config.reasoning_parser
    source = template.source if template is not None else ""
    chosen = (
        (tool_calls_of(source) or "none") if tool_calls == "auto" else tool_calls,
        (thinking_of(source) or "none") if thinking == "auto" else thinking,
    )
    if template is not None:
        log.info("parsers", tool_call_parser=chosen[0], reasoning_parser=chosen[1], asked=(tool_calls, thinking))
    return chosen


def _tokenizer_folder(config: RouterConfig, folder: Path) -> Path:
    if not config.tokenizer:
        return folder
    given = Path(config.tokenizer).expanduser()
    return given if given.exists() else locate(config.tokenizer, weights=False)


def _own_name(model: str) -> str:
    """A hub id as it is, a folder by its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    if any(folder.glob("*.safetensors")):
        checkpoint = open_checkpoint(folder)
        return checkpoint.config, checkpoint.generation_config, checkpoint.fingerprint
    log.warning("no_weights_here", folder=str(folder), effect="a scheduler's model is compared by vocabulary only")
    generation = folder / "generation_config.json"
    try:
        return read_config(folder), msgspec.json.decode(generation.read_bytes()) if generation.is_file() else {}, ""
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"cannot read {generation}: {error}") from None


def _stated_length(settings: dict[str, Any], folder: Path) -> int:
    stated = next((key for key in LENGTH_KEYS if settings.get(key) is not None), None)
    return UNSTATED_LENGTH if stated is None else _positive(settings, stated, folder)


def _positive(settings: dict[str, Any], key: str, folder: Path) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{folder / 'config.json'} has no positive {key}")
    return value


def _defaults(generation: dict[str, Any], folder: Path) -> Defaults:
    """Values outside our limits are named and left out: a request would be refused for what it did not ask."""
    found: dict[str, Any] = {}
    for name in Defaults.__struct_fields__:
        value = generation.get(name)
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value in RANGES[f"sampling.{name}"]:
            found[name] = int(value) if name == "top_k" else float(value)
        else:
            log.warning("default_ignored", file=str(folder / "generation_config.json"), field=name, value=value)
    return Defaults(**found)
