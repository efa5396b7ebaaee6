"""Calls that a request demands: the answer is held to a JSON schema, and is JSON from its first character to its last,
whatever way of calling tools the model has."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from services.router.parsing.calls import arguments, call_list
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.references import moved
from services.router.parsing.speaker import Speaker

Tool = Mapping[str, Any]


def some_calls(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """`[{"name": …, "parameters": {…}}, …]`."""
    read.record()
    whole = (yield from read.literal("[")) and (yield from call_list(read, say))
    yield from _rest(read, say, bool(whole))


def one_call(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The arguments alone, of the one tool that is named."""
    [name] = names
    read.record()
    whole = (yield from read.peek()) == "{" and (yield from arguments(read, say, name))
    yield from _rest(read, say, whole)


def _rest(read: Reader, say: Speaker, whole: bool) -> Waiting[None]:
    rest = read.recorded()
    if not whole:
        say.content(rest)
    yield from read.until((), say.content)


def schema_of_call(tool: Tool) -> dict[str, Any]:
    """The JSON schema of `one_call`."""
    return tool["function"].get("parameters") or {"type": "object"}


def schema_of_calls(tools: Sequence[Tool], *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of `some_calls`: one at least, and without `parallel` one at most. Raises PlaceError."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, "parameters": {"$ref": f"#/$defs/{at}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for at, tool in enumerate(tools)
    ]
    known = {str(at): moved(schema_of_call(tool), f"#/$defs/{at}") for at, tool in enumerate(tools)}
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, "$defs": known}
