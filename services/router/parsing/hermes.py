"""Hermes 2 and 3, Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one such block a call."""

from collections.abc import Collection

from services.router.parsing.calls import call_object
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

OPEN, CLOSE = MARKS = ("<tool_call>", "</tool_call>")


def hermes(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The marks say that it is a call, whatever name the model gives it. A block that is none is content, marks and
    all."""
    marks: tuple[str, ...] = (OPEN,)
    while mark := (yield from read.until(marks, say.content)):
        marks = (OPEN,)
        if mark == CLOSE:
            continue
        before = say.num_calls
        read.record(OPEN)
        yield from read.space()
        whole = yield from call_object(read, say)
        rest = read.recorded()
        if whole:
            yield from read.space()
        else:
            say.content(rest)
        if say.num_calls > before:
            marks = MARKS
