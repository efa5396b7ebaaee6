"""Hermes 2 and 3, Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one such block a call."""

from collections.abc import Collection

from services.router.parsing.calls import blocks, call_object
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

OPEN, CLOSE = MARKS = ("<tool_call>", "</tool_call>")


def hermes(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The marks say that it is a call, whatever name the model gives it."""
    yield from blocks(read, say, (OPEN,), CLOSE, lambda mark: _call(read, say))


def _call(read: Reader, say: Speaker) -> Waiting[bool]:
    whole = yield from call_object(read, say)
    yield from read.space()
    return whole
