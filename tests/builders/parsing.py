"""Answers taken apart, put together again for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.router.parsing.events import CallArguments, CallBegun, Content, Part, Reasoning
from services.router.parsing.families import THINKING, TOOL_CALLS
from services.router.parsing.parser import Parser, Parsing
from services.router.parsing.speaker import Tools

STRING = {"type": "string"}
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {"properties": {"city": STRING, "unit": STRING}},
    "search": {"properties": {"query": {"type": "object"}}},
    "now": {},
}


@dataclass
class Said:
    """One answer as a client puts it together. `calls` are (name, arguments)."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            match part:
                case Reasoning():
                    self.reasoning += part.text
                case Content():
                    self.content += part.text
                case CallBegun():
                    assert part.index == len(self.calls)
                    self.calls.append((part.name, ""))
                case CallArguments():
                    name, text = self.calls[part.index]
                    assert part.index == len(self.calls) - 1
                    self.calls[part.index] = (name, text + part.text)


def parser(
    tools: str = "", thinking: str = "", *, prompt_tail: str = "", parallel: bool = True, schemas: Tools = TOOLS
) -> Parser:
    """Of families by name."""
    parsing = Parsing(
        thinking=THINKING.get(thinking), tool_calls=TOOL_CALLS.get(tools), tools=schemas, parallel=parallel
    )
    return Parser(parsing, prompt_tail)


def said(pieces: Sequence[str], **how: object) -> Said:
    """What an answer says that arrives in these pieces."""
    one, told = parser(**how), Said()  # type: ignore[arg-type]
    for piece in pieces:
        told.add(one.push(piece))
    told.add(one.finish())
    return told
