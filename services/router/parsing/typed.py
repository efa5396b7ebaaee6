"""Arguments that a model writes as bare text, each between marks of its own. What JSON value one stands for is for the
tool's schema to say."""

import json
from collections.abc import Mapping
from typing import Any

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
"""What templates make of JSON's own names when they write a value as Python does."""


class Arguments:
    """Tells one call and its arguments, which become a JSON object in the order in which they come."""

    def __init__(self, read: Reader, say: Speaker, name: str, schema: Mapping[str, Any]) -> None:
        """The call begins, and cannot be taken back: what is recorded begins anew. `schema` is of all its arguments."""
        self._read, self._say = read, say
        known = schema.get("properties")
        self._schemas = known if isinstance(known, Mapping) else {}
        self._before = "{"
        say.call(name)
        read.record()

    def value(self, key: str, end: tuple[str, ...]) -> Waiting[bool]:
        """Reads and tells the value of an argument as far as one of the marks `end`, which is read too. False where
        the text ends before. One that can only be a string is told as it comes."""
        read, say = self._read, self._say
        say.arguments(f"{self._before}{_json(key)}: ")
        self._before = ", "
        kinds = _kinds(self._schemas.get(key))
        read.recorded()
        if kinds == {"string"}:
            say.arguments('"')
            ended = yield from read.until(end, lambda text: say.arguments(_json(text)[1:-1]))
            say.arguments('"' if ended else "")
        else:
            pieces: list[str] = []
            ended = yield from read.until(end, pieces.append)
            text = "".join(pieces)
            say.arguments(_converted(text, kinds) if ended else text)
        read.record()
        return bool(ended)

    def close(self) -> None:
        """The call has ended as it should. One that has not keeps arguments which are no whole JSON text."""
        self._say.arguments("{}" if self._before == "{" else "}")
        self._read.record()


def _json(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _kinds(schema: Any) -> frozenset[str]:
    """The names that JSON Schema gives to the types of a value; empty where it may be any."""
    if not isinstance(schema, Mapping):
        return frozenset()
    given, choices = schema.get("type"), schema.get("anyOf") or schema.get("oneOf")
    if isinstance(given, str | list):
        return frozenset(one for one in ([given] if isinstance(given, str) else given) if isinstance(one, str))
    if isinstance(choices, list):
        each = [_kinds(choice) for choice in choices]
        return frozenset().union(*each) if all(each) else frozenset()
    return frozenset()


def _converted(text: str, kinds: frozenset[str]) -> str:
    """JSON of a text: of what it reads as where that may be, else of a string."""
    bare = text.strip()
    literal = _PYTHON_NAMES.get(bare, bare)
    try:
        value = json.loads(literal, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _json(text)
    return literal if not kinds or any(_is(value, kind) for kind in kinds) else _json(text)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = isinstance(value, float) and value.is_integer() and kind == "integer"
    return whole or isinstance(value, _KINDS.get(kind, ()))
