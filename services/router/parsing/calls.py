"""A tool call that is a JSON object, `{"name": …, "arguments": {…}}`: what most families write, each in marks of its
own."""

from collections.abc import Callable, Collection, Sequence

from services.router.parsing.reader import Reader, Waiting, decoded
from services.router.parsing.speaker import TOOL_NAME, Speaker

ARGUMENTS = ("arguments", "parameters")
"""Hermes, Qwen and Mistral write the first, Llama the second."""


def call_object(read: Reader, say: Speaker, names: Collection[str] = ()) -> Waiting[bool]:
    """Reads one call and tells it. Arguments that follow the name are told as they come.

    False where it is none: a name that is not one of `names` (any, where empty), other JSON, or a text that ends. What
    was read and not told is recorded then, if the reader is recording.
    """
    name, told = "", False
    kept: list[str] = []
    if not (yield from read.literal("{")):
        return False
    while True:
        key = yield from _key(read)
        if key is None:
            return False
        if key == "name" and not name:
            name = (yield from read.json_string()) or ""
            if not TOOL_NAME.fullmatch(name) or (names and name not in names):
                return False
        elif key in ARGUMENTS and name and not told and (yield from read.peek()) == "{":
            told = True
            if not (yield from arguments(read, say, name)):
                return False
        elif not (yield from read.json_value(kept.append if key in ARGUMENTS else _ignore)):
            return False
        yield from read.space()
        if (yield from read.literal("}")):
            return told or _tell(say, name, kept)
        if not (yield from read.literal(",")):
            return False


def call_list(read: Reader, say: Speaker) -> Waiting[bool]:
    """Reads and tells the calls of a JSON array that has been opened. False as of `call_object`."""
    while True:
        yield from read.space()
        if not (yield from call_object(read, say)):
            return False
        read.record()
        yield from read.space()
        if (yield from read.literal("]")):
            return True
        if not (yield from read.literal(",")):
            return False


def blocks(
    read: Reader, say: Speaker, opens: tuple[str, ...], close: str, one: Callable[[str], Waiting[bool]]
) -> Waiting[None]:
    """Reads an answer with a call in each block, which begins with one of the marks `opens` and ends with `close`.
    `one` reads the call behind the mark that it is given, as `call_object` does, and what lays out its end; a block
    that is none is content, marks and all."""
    marks = opens
    while mark := (yield from read.until(marks, say.content)):
        marks = opens
        if mark == close:
            continue
        before = say.num_calls
        read.record(mark)
        yield from read.space()
        whole = yield from one(mark)
        rest = read.recorded()
        if not whole:
            say.content(rest)
        if say.num_calls > before:
            marks = (*opens, close)


def arguments(read: Reader, say: Speaker, name: str, call_id: str = "") -> Waiting[bool]:
    """Reads and tells the arguments of a call that begins with them. From here on nothing can be taken back: what is
    recorded begins anew behind them."""
    read.recorded()
    say.call(name, call_id)
    whole = yield from read.json_value(say.arguments)
    read.record()
    return whole


def _key(read: Reader) -> Waiting[str | None]:
    yield from read.space()
    key = yield from read.json_string()
    yield from read.space()
    if not (yield from read.literal(":")):
        return None
    yield from read.space()
    return key


def _ignore(text: str) -> None:
    pass


def _tell(say: Speaker, name: str, kept: Sequence[str]) -> bool:
    """A call whose arguments came before its name, as a string of JSON, or not at all."""
    given = "".join(kept)
    if given.startswith('"'):
        given = decoded(given) or ""
    elif given in ("", "null"):
        given = "{}"
    if not name or not given.startswith("{"):
        return False
    say.call(name)
    say.arguments(given)
    return True
