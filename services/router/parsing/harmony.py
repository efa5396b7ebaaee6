"""gpt-oss, which writes an answer as messages, each with a header that says what it is:
`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. A call of a tool is one with
` to=functions.name` in its header. (OpenAI's name for the format is harmony.)"""

import re
from collections.abc import Collection

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL = MARKS = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>"),
)
_TO = "to="
_PLAIN = re.compile(r"[^<]*")
_FUNCTION = re.compile(r" to=functions\.(?P<name>[A-Za-z0-9_.:/-]{1,128})(?![^ <])")
_HEADER = re.compile(
    r"(?:assistant)?(?: to=[^ <]*)?<\|channel\|>(?P<channel>analysis|commentary|final)"
    r"(?: to=[^ <]*)?(?: ?<\|constrain\|>[a-z]*| [a-z]*)?",
    re.ASCII,
)


class Harmony:
    """Reads a whole answer, its calls too."""

    marks = MARKS

    def read(self, read: Reader, say: Speaker, prompt_tail: str) -> Waiting[None]:
        """As `Thinking.read`."""
        yield from _messages(read, say)


def harmony(read: Reader, say: Speaker, names: Collection[str]) -> Waiting[None]:
    """Where reasoning is not looked for: the messages say what they are all the same."""
    yield from _messages(read, say)


def _messages(read: Reader, say: Speaker) -> Waiting[None]:
    """The prompt has begun the first header. Text without one, and what only looks like a header, is content."""
    read.record()
    yield from read.space()
    mark = yield from read.literal(CHANNEL, _TO)
    if not mark:
        say.content(read.recorded())
        mark = yield from read.until((START, CHANNEL), say.content)
    while mark:
        if mark in (START, CHANNEL):
            read.record(mark)
        header = yield from _header(read, f" {_TO}" if mark == _TO else CHANNEL if mark == CHANNEL else "")
        text = read.recorded()
        found = _HEADER.fullmatch(header)
        if found:
            mark = yield from _body(read, say, found["channel"], _FUNCTION.search(header))
        else:
            say.content(text)
            mark = ""
        if mark not in (START, CHANNEL):
            mark = yield from read.until((START, CHANNEL), say.content)


def _header(read: Reader, begun: str) -> Waiting[str]:
    """As far as the message, which begins then; empty where none does."""
    pieces = [begun]
    while True:
        pieces.append((yield from read.run(_PLAIN)))
        mark = yield from read.literal(CHANNEL, CONSTRAIN, MESSAGE)
        if mark in ("", MESSAGE):
            return "".join(pieces) if mark else ""
        pieces.append(mark)


def _body(read: Reader, say: Speaker, channel: str, function: re.Match[str] | None) -> Waiting[str]:
    """Tells a message and reads the mark that ends it; empty at the end of the text."""
    ends = (START, CHANNEL, END, CALL)
    if function and say.calls:
        say.call(function["name"])
        if mark := (yield from read.literal(*ends)):
            say.arguments("{}")
            return mark
        return (yield from read.until(ends, say.arguments))
    if channel != "analysis":
        return (yield from read.until(ends, say.content))
    say.reasoning("")
    mark = yield from read.until(ends, say.reasoning)
    say.end_reasoning()
    return mark
