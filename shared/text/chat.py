"""Chat templates, rendered as transformers renders them, in jinja2's immutable sandbox and within limits.

The template is the operator's, the messages are a client's: loops, calls and text are metered, so that no conversation
keeps a thread busy or fills the memory.
"""

import contextvars
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import msgspec
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from shared.text.tokenizer import Tokenizer, TokenizerError

MAX_STEPS = 2_000_000
"""Loop turns and calls in one rendering."""
MAX_SECONDS = 5.0
MAX_CHARS = 32 * 2**20
"""Length of any text that a rendering builds."""
MAX_POWER_BITS = 4096


class ChatTemplateError(ValueError):
    """A conversation that the template refuses, or a rendering beyond its limits. The message is for the client."""


class _Meter:
    """What one rendering has spent."""

    __slots__ = ("deadline", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ChatTemplateError("the chat template takes too many steps for this conversation")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise ChatTemplateError("the chat template takes too long for this conversation")


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("chat_meter")


def _metered(iterable: Iterable[Any]) -> Iterator[Any]:
    meter = _meter.get()
    for item in iterable:
        meter.step()
        yield item


def _limited(text: Any) -> Any:
    if isinstance(text, str) and len(text) > MAX_CHARS:
        raise ChatTemplateError(f"the rendered conversation exceeds {MAX_CHARS} characters")
    return text


def _joined(parts: Sequence[Any]) -> str:
    return _limited("".join(map(str, parts)))


class _Metering(NodeTransformer):
    """Puts a meter into every loop and a limit on every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "sluice_metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "sluice_joined", [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; for a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own convention

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_support"), [], [], body, lineno=line)

    def _support(self, caller: Any) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        return _Metering().visit(template)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _meter.get().step()
        return _limited(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _meter.get().step()
        _check_operands(operator, left, right)
        return _limited(super().call_binop(context, operator, left, right))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuses operations whose result would be huge, before they are made."""
    if operator == "*":
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        counts = [side for side in (left, right) if isinstance(side, int)]
        if sizes and counts and sizes[0] * counts[0] > MAX_CHARS:
            raise ChatTemplateError("the chat template repeats a value too often")
        if len(counts) == 2 and sum(side.bit_length() for side in counts) > MAX_POWER_BITS:
            raise ChatTemplateError("the chat template computes too large a number")
    power = operator == "**" and isinstance(left, int) and isinstance(right, int)
    if power and left.bit_length() * max(1, right) > MAX_POWER_BITS:
        raise ChatTemplateError("the chat template computes too large a number")
    if operator == "%" and isinstance(left, str) and len(left) > 4096:
        raise ChatTemplateError("the chat template formats too long a text")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["sluice_metered"] = _metered
    environment.filters["sluice_joined"] = _joined
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A checkpoint's template or templates, compiled once. Safe to use from several threads."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
            known = {name: jinja2.meta.find_undeclared_variables(environment.parse(sources[name])) for name in sources}
        except jinja2.exceptions.TemplateError as error:
            raise TokenizerError(f"the chat template is not valid: {error}") from None
        self._special_tokens = dict(special_tokens)
        self.source = "\n".join(sources.values())
        """The text of all of them."""
        self.takes_tools = "tool_use" in sources or "tools" in known.get("default", ())
        """Whether tools make a difference to what is rendered."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt, ending where the assistant speaks; with `continue_final_message` it ends with the text of the
        last message, which is to go on. Raises ChatTemplateError."""
        if continue_final_message:
            kwargs = {**(template_kwargs or {}), "add_generation_prompt": False}
            return _open_ended(self.render(messages, tools=tools, template_kwargs=kwargs), messages[-1])
        if not messages:
            raise ChatTemplateError("the conversation is empty")
        template = self._choose(tools)
        values = {"add_generation_prompt": True, **self._special_tokens, **(template_kwargs or {})}
        values |= {"messages": list(messages), "tools": list(tools) if tools is not None else None}
        values.setdefault("documents", None)
        token = _meter.set(_Meter())
        try:
            return _collect(template.generate(values))
        except ChatTemplateError:
            raise
        except jinja2.exceptions.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses this conversation: {error.message}") from None
        except RecursionError:
            raise ChatTemplateError("the chat template nests too deeply for this conversation") from None
        except Exception as error:  # a template may fail in any way that Python can, on a client's values
            raise ChatTemplateError(f"the chat template fails on this conversation ({type(error).__name__})") from None
        finally:
            _meter.reset(token)

    def _choose(self, tools: Sequence[Any] | None) -> jinja2.Template:
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        raise ChatTemplateError(f"the model has no default chat template, only {sorted(self._templates)}")


def _open_ended(rendered: str, last: Mapping[str, Any]) -> str:
    """Without what the template writes behind the last message's text; it may have stripped that of white space."""
    text = last.get("content")
    bare = text.strip() if isinstance(text, str) else ""
    begin = rendered.rfind(bare) if bare else -1
    if not isinstance(text, str) or begin < 0:
        raise ChatTemplateError("the last message has no text that could be continued")
    whole = text.lstrip()
    return rendered[: begin + len(whole if rendered.startswith(whole, begin) else bare)]


def _collect(pieces: Iterable[str]) -> str:
    meter, length, parts = _meter.get(), 0, []
    for piece in pieces:
        meter.step()
        length += len(piece)
        if length > MAX_CHARS:
            raise ChatTemplateError(f"the rendered conversation exceeds {MAX_CHARS} characters")
        parts.append(piece)
    return "".join(parts)


def load_chat_template(folder: Path, tokenizer: Tokenizer, override: str = "") -> ChatTemplate | None:
    """The template of `--chat-template`, else of chat_template.jinja, else of tokenizer_config.json; None without one.

    Raises TokenizerError where one is there and cannot be used.
    """
    sources = _override(Path(override)) if override else _sources(folder)
    return ChatTemplate(sources, tokenizer.named_tokens) if sources else None


def _override(path: Path) -> dict[str, str]:
    try:
        return {"default": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise TokenizerError(f"--chat-template: cannot read {path}: {why}") from None


def _sources(folder: Path) -> dict[str, str]:
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
        return found or _declared(folder / "tokenizer_config.json")
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise TokenizerError(f"cannot read the chat template of {folder}: {error}") from None


class _Named(msgspec.Struct):
    name: str
    template: str


class _Config(msgspec.Struct):
    chat_template: str | list[_Named] | None = None


def _declared(config: Path) -> dict[str, str]:
    if not config.is_file():
        return {}
    declared = msgspec.json.decode(config.read_bytes(), type=_Config).chat_template
    if isinstance(declared, list):
        return {entry.name: entry.template for entry in declared}
    return {"default": declared} if declared else {}
