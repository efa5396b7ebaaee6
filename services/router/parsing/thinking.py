"""Models that think before they answer, and put marks around it."""

from enum import Enum
from typing import Protocol

import msgspec

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker

TAIL_TOKENS = 32
"""Of a prompt: their text says whether reasoning is opened or closed there."""


class Begins(Enum):
    """How an answer begins."""

    WITHIN = "within reasoning"
    PERHAPS = "with the mark of reasoning, or without any"
    BEHIND = "behind reasoning, or where there is none"


class Thinks(Protocol):
    """How one family tells its reasoning apart."""

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be seen of the text."""

    def read(self, read: Reader, say: Speaker, prompt_tail: str) -> Waiting[None]:
        """Reads reasoning, if the answer begins with any, and perhaps all that follows. `prompt_tail` is the prompt's
        end."""


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """The marks around reasoning. A model that thinks `always` may leave out the first."""

    open: str = "<think>"
    close: str = "</think>"
    always: bool = False

    @property
    def marks(self) -> tuple[str, str]:
        return self.open, self.close

    def begins(self, prompt_tail: str) -> Begins:
        """Templates may open reasoning in the prompt, or open and close it there, so that there is none: `prompt_tail`
        is the prompt's end."""
        tail = prompt_tail.rstrip()
        if tail.endswith(self.close):
            return Begins.BEHIND
        return Begins.WITHIN if self.always or tail.endswith(self.open) else Begins.PERHAPS

    def read(self, read: Reader, say: Speaker, prompt_tail: str) -> Waiting[None]:
        """Reads reasoning, if the answer begins with any."""
        begins = self.begins(prompt_tail)
        if begins is Begins.BEHIND:
            return say.end_reasoning()
        read.record()
        yield from read.space()
        marked = yield from read.literal(self.open)
        before = read.recorded()
        if marked or begins is Begins.WITHIN:
            say.reasoning("" if marked else before)
            yield from read.until((self.close,), say.reasoning)
            say.end_reasoning()
        else:
            say.content(before)
