"""Stop strings, found across token borders: text that may begin one is held back until it cannot."""

from collections import deque
from collections.abc import Sequence

import msgspec


class StopStrings:
    """An Aho-Corasick automaton over the characters of all stop strings. Immutable: shared by a request's samples."""

    __slots__ = ("_depth", "_fail", "_match", "_next", "strings")

    def __init__(self, strings: Sequence[str]) -> None:
        if any(not string for string in strings):
            raise ValueError("an empty stop string would match everywhere")
        self.strings = tuple(strings)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fail = [0]
        self._match: list[str | None] = [None]
        for string in self.strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            found = self._next[state].get(char)
            if found is None:
                found = len(self._next)
                self._next[state][char] = found
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fail.append(0)
                self._match.append(None)
            state = found
        self._match[state] = string

    def _link(self) -> None:
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                waiting.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character: the longest suffix that begins a stop string."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def match(self, state: int) -> str | None:
        """The stop string that ends here; the longest where several do."""
        return self._match[state]

    def depth(self, state: int) -> int:
        """How many of the last characters may begin a stop string."""
        return self._depth[state]


class Found(msgspec.Struct, frozen=True):
    """`text` may be sent; `stop` is the stop string that ended the sample, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """One sample's search. The first match to be complete wins, the longest of those that end together; the result
    does not depend on how the text was cut into tokens."""

    __slots__ = ("_held", "_state", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self._held = ""

    def push(self, text: str) -> Found:
        """Takes the next piece of text; what follows a match is dropped."""
        if not text:
            return Found("")
        stops, state = self._stops, self._state
        buffer = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            state = stops.step(state, char)
            stop = stops.match(state)
            if stop is not None:
                self._held, self._state = "", 0
                return Found(buffer[: position - len(stop)], stop)
        keep = stops.depth(state)
        self._state = state
        self._held = buffer[len(buffer) - keep :]
        return Found(buffer[: len(buffer) - keep])

    def flush(self) -> str:
        """The text held back, when no more can come."""
        held, self._held, self._state = self._held, "", 0
        return held
