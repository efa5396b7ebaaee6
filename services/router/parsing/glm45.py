"""GLM 4.5 to 4.7: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`, each on a line of
its own or all on one."""

import re

from services.router.parsing.calls import blocks
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import TOOL_NAME, Speaker, Tools
from services.router.parsing.typed import Arguments

OPEN, CLOSE, KEY, END_KEY, VALUE, END_VALUE = MARKS = (
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
_NAME = re.compile(r"[^<>\n ]*")
_KEY = re.compile(r"[^<>\n]*")


def glm45(read: Reader, say: Speaker, tools: Tools) -> Waiting[None]:
    """The marks say that it is a call, whatever name the model gives it."""
    yield from blocks(read, say, (OPEN,), CLOSE, lambda mark: _call(read, say, tools))


def _call(read: Reader, say: Speaker, tools: Tools) -> Waiting[bool]:
    name = yield from read.run(_NAME)
    yield from read.space()
    mark = yield from read.literal(KEY, CLOSE)
    if not mark or not TOOL_NAME.fullmatch(name):
        return False
    arguments = Arguments(read, say, name, tools.get(name, {}))
    while mark == KEY:
        key = (yield from read.run(_KEY)).strip()
        if not key or not (yield from read.literal(END_KEY)):
            return False
        yield from read.space()
        if not (yield from read.literal(VALUE)) or not (yield from arguments.value(key, (END_VALUE,))):
            return False
        yield from read.space()
        mark = yield from read.literal(KEY, CLOSE)
    if mark:
        arguments.close()
    return bool(mark)
