"""Calls written in Python: an answer that is `[get_weather(city="Paris"), now()]` (Llama 3.2 and 4, ToolACE), between
marks now and then."""

import ast
import json
import re
import warnings
from collections.abc import Collection
from typing import Any

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

OPEN, CLOSE = MARKS = ("<|python_start|>", "<|python_end|>")
MAX_CHARS = 64 * 1024
"""Of a list of calls: Python's parser takes it as a whole, and while it does nothing else is answered."""
_NAME = re.compile(r"[\w.]*")
_PLAIN = re.compile(r"[^\"'\[\](){}]*")
_QUOTED = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
_JSON_NAMES = {"true": True, "false": False, "null": None}


def pythonic(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """A list is one of calls if it begins with the name of a tool; its calls are told once it is whole."""
    mark = ""
    while True:
        read.record()
        yield from read.space()
        listed = yield from _listed(read, names)
        text = read.recorded()
        if listed and _tell(say, text.strip(), names):
            yield from read.space()
            yield from read.literal(CLOSE)
        else:
            say.content(mark + text)
        mark = yield from read.until((OPEN,), say.content)
        if not mark:
            return


def _listed(read: Reader, names: Collection[str]) -> Waiting[bool]:
    """Reads a list of calls to its end, other text as far as it may begin one."""
    if not (yield from read.literal("[")):
        return False
    yield from read.space()
    if (yield from read.run(_NAME)) not in names or (yield from read.peek()) != "(":
        return False
    depth = 1
    while depth:
        yield from read.run(_PLAIN)
        char = yield from read.peek()
        if not char:
            return False
        read.take(1)
        if char in _QUOTED:
            yield from _quoted(read, char)
        else:
            depth += 1 if char in "[({" else -1
    return True


def _quoted(read: Reader, quote: str) -> Waiting[None]:
    """Reads a string to its end."""
    while True:
        yield from read.run(_QUOTED[quote])
        if not (char := (yield from read.peek())):
            return
        read.take(1)
        if char == quote:
            return
        if (yield from read.peek()):
            read.take(1)


def _tell(say: Speaker, text: str, names: Collection[str]) -> bool:
    """Tells the calls of a list: all of them, or none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            calls = [_call(node, names) for node in _elements(text)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False
    for name, arguments in calls:
        say.call(name)
        say.arguments(arguments)
    return True


def _elements(text: str) -> list[ast.expr]:
    tree = ast.parse(text, mode="eval").body if len(text) <= MAX_CHARS else None
    if not isinstance(tree, ast.List):
        raise ValueError("not a list")
    return tree.elts


def _call(node: ast.expr, names: Collection[str]) -> tuple[str, str]:
    """The tool and its arguments as JSON."""
    if not isinstance(node, ast.Call) or node.args or ast.unparse(node.func) not in names:
        raise ValueError("not a call of a tool with named arguments")
    given = {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if None in given:
        raise ValueError("arguments without names")
    arguments = json.dumps(given, ensure_ascii=False, allow_nan=False)
    arguments.encode()
    return ast.unparse(node.func), arguments


def _value(node: ast.expr | None) -> Any:
    """Of a literal, where JSON's own names are taken for Python's."""
    match node:
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=elements):
            return [_value(one) for one in elements]
        case ast.Dict(keys=keys, values=values):
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case None:
            raise ValueError("not a literal")
        case _:
            return ast.literal_eval(node)
