"""Text that arrives in pieces, for functions that read it as if it were there.

A function that reads is a generator: it yields where it needs more text, and goes on when there is more or the text has
ended. Every character is looked at a bounded number of times, however the text is cut.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Waiting = Generator[None, None, T]
"""Reads, with a result."""
Sink = Callable[[str], None]

SPACE = " \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^\s,\[\]{}\"]*")


class Reader:
    """The text of one answer, up to its end."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._record: list[str] | None = None

    def feed(self, text: str) -> None:
        """More of the text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Nothing follows."""
        self._ended = True

    # Going back is not possible, but what was read can be kept.

    def record(self, before: str = "") -> None:
        """Keeps what is read from here on, behind what was read just before."""
        self._record = [before]

    def recorded(self) -> str:
        """What was read since `record`, which is kept no longer."""
        text = "".join(self._record or ())
        self._record = None
        return text

    def take(self, length: int) -> str:
        """The next characters, which must be there."""
        text = self._text[self._at : self._at + length]
        self._at += length
        if self._record is not None:
            self._record.append(text)
        return text

    @property
    def _left(self) -> int:
        return len(self._text) - self._at

    def _more(self) -> Waiting[bool]:
        """Waits for text beyond what is here. False where there is none."""
        before = self._left
        while self._left == before and not self._ended:
            yield
        return self._left > before

    # What a function may read.

    def peek(self) -> Waiting[str]:
        """The next character, which stays; empty at the end."""
        if not self._left and not (yield from self._more()):
            return ""
        return self._text[self._at]

    def run(self, pattern: re.Pattern[str]) -> Waiting[str]:
        """The next characters of one kind, of which `pattern` matches any number."""
        pieces: list[str] = []
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None
            pieces.append(self.take(len(found[0])))
            if self._left or not (yield from self._more()):
                return "".join(pieces)

    def space(self) -> Waiting[str]:
        """Any white space."""
        return (yield from self.run(_SPACE))

    def literal(self, *expected: str) -> Waiting[str]:
        """That one of the texts which comes next, none of them beginning another; else nothing is read."""
        longest = max(map(len, expected))
        while True:
            rest = self._text[self._at : self._at + longest]
            for one in expected:
                if rest.startswith(one):
                    return self.take(len(one))
            if not any(one.startswith(rest) for one in expected) or not (yield from self._more()):
                return ""

    def until(self, marks: Sequence[str], sink: Sink) -> Waiting[str]:
        """Hands over what comes before the first of the marks and reads that too. Only what may begin a mark is held
        back. Empty where the text ends without one; then all of it was handed over."""
        while True:
            found = [(at, mark) for mark in marks if (at := self._text.find(mark, self._at)) >= 0]
            if found:
                at, mark = min(found)
                sink(self.take(at - self._at))
                return self.take(len(mark))
            sink(self.take(self._left - self._held(marks)))
            if not (yield from self._more()):
                sink(self.take(self._left))
                return ""

    def _held(self, marks: Sequence[str]) -> int:
        """How many of the last characters may begin a mark."""
        if not marks:
            return 0
        longest = max(map(len, marks)) - 1
        tail = self._text[max(self._at, len(self._text) - longest) :]
        begins = [at for mark in marks if (at := tail.find(mark[0])) >= 0]
        for at in range(min(begins, default=len(tail)), len(tail)):
            if any(mark.startswith(tail[at:]) for mark in marks):
                return len(tail) - at
        return 0

    def json_string(self) -> Waiting[str | None]:
        """A JSON string, decoded; None where there is none, or none that is text."""
        if (yield from self.peek()) != '"':
            return None
        pieces: list[str] = []
        whole = yield from self.json_value(pieces.append)
        return decoded("".join(pieces)) if whole else None

    def json_value(self, sink: Sink) -> Waiting[bool]:
        """Hands over one JSON value as it comes. Its end is found by brackets and strings, nothing else is checked.
        False where there is none, or the text ends within it."""
        if (yield from self.peek()) in ("{", "[", '"'):
            return (yield from self._enclosed(sink))
        scalar = yield from self.run(_SCALAR)
        sink(scalar)
        return bool(scalar) and self._left > 0

    def _enclosed(self, sink: Sink) -> Waiting[bool]:
        depth, inside, skip = 0, False, 0
        while True:
            text, at = self._text, self._at + skip
            while found := (_INSIDE if inside else _OUTSIDE).search(text, at):
                at, mark = found.end(), found[0]
                if mark == "\\":
                    at += 1
                elif mark == '"':
                    inside = not inside
                else:
                    depth += 1 if mark in "{[" else -1
                if depth == 0 and not inside:
                    sink(self.take(at - self._at))
                    return True
            skip = max(0, at - len(text))  # of a character that is escaped and yet to come
            sink(self.take(self._left))
            if not (yield from self._more()):
                return False


def decoded(literal: str) -> str | None:
    """The text that a JSON string stands for; None where it is none, or not valid Unicode."""
    try:
        text = json.loads(literal, strict=False)
        text.encode()
    except (ValueError, AttributeError):
        return None
    return text
