"""Qwen3-Coder, and others after it: between `<tool_call>` marks `<function=name>`, for each argument
`<parameter=key>value</parameter>` with a line break around the value, and `</function>`."""

import re

from services.router.parsing.calls import blocks
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import TOOL_NAME, Speaker, Tools
from services.router.parsing.typed import Arguments

OPEN, CLOSE, FUNCTION, END, PARAMETER, END_PARAMETER = MARKS = (
    *("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
)
_VALUE_ENDS = ("\n" + END_PARAMETER, END_PARAMETER)
_NAME = re.compile(r"[^<>\n]*")


def qwen3_coder(read: Reader, say: Speaker, tools: Tools) -> Waiting[None]:
    """The models leave the first mark out now and then: without it, a call is one of a tool that was named."""
    yield from blocks(read, say, (OPEN, FUNCTION), CLOSE, lambda mark: _call(read, say, mark, tools))


def _call(read: Reader, say: Speaker, mark: str, tools: Tools) -> Waiting[bool]:
    if mark == OPEN and not (yield from read.literal(FUNCTION)):
        return False
    name = (yield from read.run(_NAME)).strip()
    known = TOOL_NAME.fullmatch(name) if mark == OPEN else name in tools
    if not known or not (yield from read.literal(">")):
        return False
    arguments = Arguments(read, say, name, tools.get(name, {}))
    while True:
        yield from read.space()
        if end := (yield from read.literal(END, CLOSE)):
            arguments.close()
            if end == END:
                yield from read.space()
            return True
        if not (yield from read.literal(PARAMETER)):
            return False
        key = (yield from read.run(_NAME)).strip()
        if not key or not (yield from read.literal(">")):
            return False
        yield from read.literal("\n")
        if not (yield from arguments.value(key, _VALUE_ENDS)):
            return False
