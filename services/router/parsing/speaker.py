"""Collects what a parser finds, without the white space that only lays it out."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from services.router.parsing.events import CallArguments, CallBegun, Content, Part, Reasoning
from services.router.parsing.reader import SPACE

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of tools' parameters, by the tools' names."""
NewId = Callable[[str, int], str]
"""Makes the id of a call of the tool of that name, the index-th of its answer."""


class Speaker:
    """One answer's parts. White space around tool calls, and the empty lines around reasoning, are nobody's text."""

    def __init__(self, new_id: NewId, *, calls: bool, parallel: bool) -> None:
        """`calls`: tools may be called, so that trailing white space waits for what follows. Not `parallel`: only the
        first call is told."""
        self.calls = calls
        self._new_id = new_id
        self._parallel = parallel
        self._trailing = SPACE if calls else ""
        self._parts: list[Part] = []
        self._held: list[str] = []
        self._thinking = False
        self._leading = ""
        """What is stripped of the next text."""
        self._after_call = False
        self.num_calls = 0

    def take(self) -> list[Part]:
        """What was said since the last call."""
        parts, self._parts = self._parts, []
        return parts

    def reasoning(self, text: str) -> None:
        if not self._thinking:
            self._thinking, self._leading = True, "\n"
        text = self._trimmed(text, "\n")
        if text:
            self._parts.append(Reasoning(text))

    def end_reasoning(self) -> None:
        self._thinking, self._held, self._leading = False, [], "\n"

    def content(self, text: str) -> None:
        text = self._trimmed(text, self._trailing)
        if text:
            self._after_call = False
            self._parts.append(Content(text))

    def _trimmed(self, text: str, trailing: str) -> str:
        """Without what is to be stripped at its beginning, and its end held back."""
        text = text.lstrip(self._leading) if self._leading else text
        if not text:
            return ""
        self._leading = ""
        kept = text.rstrip(trailing) if trailing else text
        if not kept:
            self._held.append(text)
            return ""
        kept, self._held = "".join((*self._held, kept)), [text[len(kept) :]]
        return kept

    def call(self, name: str, call_id: str = "") -> None:
        """A call begins; its arguments come next. `call_id` is what the model calls it, where it does."""
        self._held, self._leading, self._after_call = [], "", True
        self.num_calls += 1
        if self._told:
            self._parts.append(CallBegun(self.num_calls - 1, call_id or self._new_id(name, self.num_calls - 1), name))

    def arguments(self, text: str) -> None:
        if text and self._told:
            self._parts.append(CallArguments(self.num_calls - 1, text))

    @property
    def _told(self) -> bool:
        return self._parallel or self.num_calls == 1

    def close(self) -> None:
        """Nothing more will be said."""
        held = "".join(self._held)
        if held and not self._thinking and not self._after_call:
            self._parts.append(Content(held))
        self._held = []
