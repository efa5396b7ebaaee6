"""DeepSeek V3 and R1: between marks, `function`, a separator, the name, and the arguments in a fence of Markdown's.
V3.1: the name, the separator, the arguments."""

import re
from collections.abc import Collection

from services.router.parsing.calls import arguments
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.sections import Section, sections
from services.router.parsing.speaker import TOOL_NAME, Speaker

_OPEN, _CLOSE, _CALL, _END_CALL, SEPARATOR = MARKS = tuple(
    f"<\uff5ctool\u2581{words}\uff5c>"
    for words in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)
SECTION = Section(open=_OPEN, close=_CLOSE, call=_CALL, end_call=_END_CALL)
FENCE = "```"
_WORD = re.compile(r"[A-Za-z0-9_.:/-]*")


def deepseek(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The marks say that it is a call, whatever name the model gives it."""
    yield from sections(read, say, SECTION, lambda: _call(read, say))


def _call(read: Reader, say: Speaker) -> Waiting[bool]:
    name = yield from read.run(_WORD)
    if not (yield from read.literal(SEPARATOR)):
        return False
    yield from read.space()
    fenced = (yield from read.peek()) != "{"
    if fenced:
        name = yield from read.run(_WORD)
        yield from read.space()
        if not (yield from read.literal(FENCE + "json")):
            return False
        yield from read.space()
    if not TOOL_NAME.fullmatch(name) or (yield from read.peek()) != "{":
        return False
    whole = yield from arguments(read, say, name)
    if whole and fenced:
        yield from read.space()
        yield from read.literal(FENCE)
    return whole
