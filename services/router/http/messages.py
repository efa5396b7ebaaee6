"""An assistant's message out of the parts that a parser finds: whole, or what a chunk of a stream adds to it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from services.router.parsing.events import CallArguments, CallBegun, Content, Part, Reasoning


@dataclass(slots=True)
class _Call:
    """A call, or more of one: then it has arguments alone."""

    begun: CallBegun | None = None
    arguments: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        arguments = "".join(self.arguments)
        if self.begun is None:
            return {"function": {"arguments": arguments}}
        function = {"name": self.begun.name, "arguments": arguments}
        return {"id": self.begun.id, "type": "function", "function": function}


@dataclass(slots=True)
class Message:
    """Parts put together. Reasoning goes by both names that clients know, DeepSeek's and vLLM's later one."""

    _content: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, _Call] = field(default_factory=dict)

    def add(self, parts: Iterable[Part], *, reasoning: bool = True) -> "Message":
        """Parts in their order; without `reasoning`, that is left out."""
        for part in parts:
            match part:
                case Content():
                    self._content.append(part.text)
                case Reasoning():
                    if reasoning:
                        self._reasoning.append(part.text)
                case CallBegun():
                    self._calls[part.index] = _Call(part)
                case CallArguments():
                    self._calls.setdefault(part.index, _Call()).arguments.append(part.text)
        return self

    def delta(self) -> dict[str, Any]:
        """As a chunk tells it; empty where there is nothing to tell."""
        told = self._thoughts()
        if self._content:
            told["content"] = "".join(self._content)
        if self._calls:
            told["tool_calls"] = [{"index": index, **call.told()} for index, call in self._calls.items()]
        return told

    def whole(self) -> dict[str, Any]:
        """As a body tells it: without content it is null, if there is anything else."""
        told = self._thoughts()
        if self._calls:
            told["tool_calls"] = [call.told() for call in self._calls.values()]
        return {"content": "".join(self._content) or (None if told else ""), **told}

    def _thoughts(self) -> dict[str, Any]:
        text = "".join(self._reasoning)
        return {"reasoning": text, "reasoning_content": text} if text else {}
