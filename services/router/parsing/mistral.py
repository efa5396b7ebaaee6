"""Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, and since version 11 of its tokenizer, for each call by
itself, `[TOOL_CALLS]name[ARGS]{…}` or `[TOOL_CALLS]name{…}`, with `[CALL_ID]id` behind the name in some models."""

import re
from collections.abc import Collection

from services.router.parsing.calls import arguments, call_list
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import TOOL_NAME, Speaker

OPEN, ID, ARGS = MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_WORD = re.compile(r"[A-Za-z0-9_.:/-]*")


def mistral(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The mark says that calls follow, whatever names the model gives them."""
    while (yield from read.until((OPEN,), say.content)):
        read.record(OPEN)
        yield from read.space()
        listed = yield from read.literal("[")
        whole = yield from (call_list(read, say) if listed else _named(read, say))
        rest = read.recorded()
        if not whole:
            say.content(rest)


def _named(read: Reader, say: Speaker) -> Waiting[bool]:
    name = yield from read.run(_WORD)
    if not TOOL_NAME.fullmatch(name):
        return False
    if (yield from read.literal(ID, ARGS)) == ID:
        yield from read.run(_WORD)
        yield from read.literal(ARGS)
    yield from read.space()
    if (yield from read.peek()) != "{":
        return False
    return (yield from arguments(read, say, name))
