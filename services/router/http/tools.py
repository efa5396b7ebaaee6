"""Tools that a chat may call, and the calls in its messages: checked, and made what templates and parsers take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.router.limits import MAX_TOOLS, check_depth, invalid
from services.router.model import ServedModel
from services.router.parsing.forced import schema_of_call, schema_of_calls
from services.router.parsing.references import PlaceError
from services.router.parsing.speaker import TOOL_NAME
from services.router.structured import MAX_BYTES
from shared.outcome import refuse

Tool = Mapping[str, Any]


class Arguments(dict[str, Any]):
    """The arguments of a call in a message. Some templates ask for their entries, some write them out: to those they
    are the JSON text that the client sent."""

    def __init__(self, text: str, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The tools that the model is to know, none of them where `tool_choice` is "none", and what it is to do."""

    tools: tuple[Tool, ...] = ()
    demanded: bool = False
    """It must call one."""
    named: str = ""
    """It must call this one."""
    parallel: bool = True

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the parameters of the tools that may be called, by their names."""
        known = {tool["function"]["name"]: schema_of_call(tool) for tool in self.tools}
        return {self.named: known[self.named]} if self.named else known

    def schema(self) -> str:
        """The JSON schema of an answer that is the calls demanded. Raises RefusedError."""
        own = msgspec.json.encode(self.schemas[self.named] if self.named else self.schemas)
        if len(own) > MAX_BYTES:  # before more is made of it
            raise invalid("tools", f"their parameters exceed {MAX_BYTES} bytes, the most where a call is demanded")
        if self.named:
            return own.decode()
        try:
            return msgspec.json.encode(schema_of_calls(self.tools, parallel=self.parallel)).decode()
        except PlaceError as error:
            raise invalid("tools", str(error)) from None


def tools_offered(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None, model: ServedModel) -> Offer:
    """What a request says of tools. Raises RefusedError."""
    tools = check_tools(tools, model)
    asked, named = _choice(choice, {tool["function"]["name"] for tool in tools})
    if asked == "none" or not tools:
        return Offer()
    if asked == "auto" and model.tool_calls is None:
        message = "tools: how this model calls tools is not known; start with --tool-call-parser, or demand a call"
        raise refuse("unsupported", message, field="tools")
    return Offer(tools=tuple(tools), demanded=asked != "auto", named=named, parallel=parallel is not False)


def check_tools(tools: Sequence[Tool] | None, model: ServedModel) -> Sequence[Tool]:
    """Raises RefusedError where they are not well formed, or the chat template has no place for them."""
    if not tools:
        return ()
    if len(tools) > MAX_TOOLS:
        raise invalid("tools", f"{len(tools)} tools; {MAX_TOOLS} are allowed")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        name = _checked(f"tools[{at}]", tool)
        if name in names:
            raise invalid(f"tools[{at}].function.name", f"{name!r} is the name of an earlier tool; rename one")
        names.add(name)
    check_depth("tools", tools)
    if model.chat_template is None or not model.chat_template.takes_tools:
        message = "tools: the chat template of this model has no place for tools; start with --chat-template"
        raise refuse("unsupported", message, field="tools")
    return tools


def _checked(field: str, tool: Tool) -> str:
    """The name of a tool that is well formed."""
    if tool.get("type") != "function":
        raise invalid(f"{field}.type", 'is "function"')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{field}.function", "is an object with a name")
    for key, kind, what in (("description", str, "a string"), ("parameters", dict, "a JSON schema, an object")):
        if not isinstance(function.get(key), kind | None):
            raise invalid(f"{field}.function.{key}", f"is {what}")
    return _named(f"{field}.function.name", function.get("name"))


def _named(field: str, name: Any) -> str:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise invalid(field, "is 1 to 128 letters, digits and _ . : / -")
    return name


def _choice(given: Any, names: set[str]) -> tuple[str, str]:
    """One of "auto", "none", "required" and "function", and that function's name."""
    if given is None or given in ("auto", "none"):
        return given or "auto", ""
    if not names:
        raise invalid("tool_choice", "needs tools")
    if isinstance(given, dict):
        function = given.get("function")
        if given.get("type") != "function" or not isinstance(function, dict):
            message = 'is {"type": "function", "function": {"name": …}}; for "allowed_tools" send those tools alone'
            raise invalid("tool_choice", message)
        name = _named("tool_choice.function.name", function.get("name"))
        if name not in names:
            raise invalid("tool_choice.function.name", f"{name!r} is none of the tools")
        return "function", name
    if given != "required":
        raise invalid("tool_choice", 'is "auto", "none", "required" or names a function')
    return "required", ""


def past_calls(field: str, given: Any) -> list[dict[str, Any]]:
    """The calls in an assistant's message, as templates take them. Raises RefusedError."""
    if not isinstance(given, list):
        raise invalid(field, "is a list of calls")
    return [_past_call(f"{field}[{at}]", call) for at, call in enumerate(given)]


def _past_call(field: str, given: Any) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict):
        raise invalid(f"{field}.function", "is an object with a name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise invalid(f"{field}.function.name", "is needed, and is a string")
    arguments = _arguments(f"{field}.function.arguments", function.get("arguments"))
    return {"type": "function", **given, "function": {**function, "arguments": arguments}}


def _arguments(field: str, given: Any) -> Any:
    """An object, where they are one: a model's own may be cut off or wrong, and are passed on as they are."""
    if given is None or isinstance(given, dict):
        return given or {}
    if not isinstance(given, str):
        raise invalid(field, "is a string of JSON")
    if not given.strip():
        return {}
    try:
        entries = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return Arguments(given, entries) if isinstance(entries, dict) else given
