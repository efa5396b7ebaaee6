"""Calls in one section of an answer, each a JSON object between marks: what DeepSeek and Kimi write."""

from collections.abc import Callable

import msgspec

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The marks of a section and of each call in it."""

    open: str
    close: str
    call: str
    end_call: str


def sections(read: Reader, say: Speaker, marks: Section, one: Callable[[], Waiting[bool]]) -> Waiting[None]:
    """Reads an answer with calls in sections. `one` reads a call between its marks as `calls.arguments` does; where it
    is none, the rest of its section is content, marks and all."""
    while (yield from read.until((marks.open,), say.content)):
        read.record(marks.open)
        yield from read.space()
        whole = False
        while (yield from read.literal(marks.call)):
            whole = yield from one()
            yield from read.space()
            if not (whole and (yield from read.literal(marks.end_call))):
                break
            yield from read.space()
            read.record()
        yield from read.literal(marks.close)
        rest = read.recorded()
        if not whole:
            say.content(rest)
