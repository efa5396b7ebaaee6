"""Kimi K2: between marks, `functions.name:number`, another mark, and the arguments. That first text is the call's id:
the chat template writes it back, and the model knows its own calls by it."""

import re
from collections.abc import Collection

from services.router.parsing.calls import arguments
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.sections import Section, sections
from services.router.parsing.speaker import Speaker

SECTION = Section(
    open="<|tool_calls_section_begin|>",
    close="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    end_call="<|tool_call_end|>",
)
ARGUMENTS = "<|tool_call_argument_begin|>"
MARKS = (SECTION.open, SECTION.close, SECTION.call, SECTION.end_call, ARGUMENTS)
_ID = re.compile(r"[A-Za-z0-9_.:/-]*")
_PARTS = re.compile(r"(?:functions\.)?(?P<name>.{1,128}?)(?P<number>:[0-9]{1,9})?")


def kimi_k2(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """The marks say that it is a call, whatever name the model gives it."""
    yield from sections(read, say, SECTION, lambda: _call(read, say))


def _call(read: Reader, say: Speaker) -> Waiting[bool]:
    yield from read.space()
    call_id = yield from read.run(_ID)
    yield from read.space()
    parts = _PARTS.fullmatch(call_id)
    if not parts or not (yield from read.literal(ARGUMENTS)):
        return False
    yield from read.space()
    if (yield from read.peek()) != "{":
        return False
    return (yield from arguments(read, say, parts["name"], call_id if parts["number"] else ""))


def new_id(name: str, index: int) -> str:
    """Of a call that the model has not named."""
    return f"functions.{name}:{index}"
