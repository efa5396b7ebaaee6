"""Runs one answer through its model's readers."""

import msgspec

from services.router.parsing.events import Part
from services.router.parsing.families import ToolCalls, call_id
from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker, Tools
from services.router.parsing.thinking import Thinks


class Parsing(msgspec.Struct, frozen=True, kw_only=True):
    """How the answers to one request are to be taken apart. None: that part is not looked for."""

    thinking: Thinks | None = None
    tool_calls: ToolCalls | None = None
    tools: Tools = {}
    """Those that may be called."""
    parallel: bool = True
    """Whether more than the first call is told."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What the parser must see of the text, where the tokens are special too."""
        return (*(self.thinking.marks if self.thinking else ()), *(self.tool_calls.marks if self.tool_calls else ()))


class Parser:
    """Takes one answer apart. What `push` and `finish` return, put together, does not depend on how the text is cut."""

    def __init__(self, parsing: Parsing, prompt_tail: str) -> None:
        """`prompt_tail` are the last characters of the prompt."""
        calls = parsing.tool_calls
        self._reader = Reader()
        self._speaker = Speaker(calls.new_id if calls else call_id, calls=calls is not None, parallel=parsing.parallel)
        self._reading = self._read(parsing, prompt_tail)
        next(self._reading, None)

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return self._speaker.num_calls

    def push(self, text: str) -> list[Part]:
        """What the next piece of the text says."""
        self._reader.feed(text)
        next(self._reading, None)
        return self._speaker.take()

    def finish(self) -> list[Part]:
        """What was held back; nothing may follow."""
        self._reader.end()
        next(self._reading, None)
        self._speaker.close()
        return self._speaker.take()

    def _read(self, parsing: Parsing, prompt_tail: str) -> Waiting[None]:
        read, say = self._reader, self._speaker
        if parsing.thinking is not None:
            yield from parsing.thinking.read(read, say, prompt_tail)
        if parsing.tool_calls is not None:
            yield from parsing.tool_calls.read(read, say, parsing.tools)
        else:
            yield from read.until((), say.content)
