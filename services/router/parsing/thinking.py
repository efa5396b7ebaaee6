"""Models that think before they answer, and put marks around it."""

from typing import Protocol

import msgspec

from services.router.parsing.reader import Reader, Waiting
from services.router.parsing.speaker import Speaker


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

    def read(self, read: Reader, say: Speaker, prompt_tail: str) -> Waiting[None]:
        """Templates may open reasoning in the prompt, or open and close it there, so that there is none."""
        tail = prompt_tail.rstrip()
        if tail.endswith(self.close):
            return say.end_reasoning()
        within = self.always or tail.endswith(self.open)
        read.record()
        yield from read.space()
        marked = yield from read.literal(self.open)
        before = read.recorded()
        if marked or within:
            say.reasoning("" if marked else before)
            yield from read.until((self.close,), say.reasoning)
            say.end_reasoning()
        else:
            say.content(before)
