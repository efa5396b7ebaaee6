"""Whole answers of a running cluster, collected through a real client."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from services.cli.client import Accepted, CallError, Client, Delta, Event, Finished, Logprobs, Request


@dataclass
class Answer:
    """What one request got. `status` is OK, or the name of the status that ended it."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)
    accepted: Accepted | None = None
    status: str = "OK"
    error: CallError | None = None

    @property
    def only(self) -> list[int]:
        """The tokens of sample 0."""
        return self.tokens.get(0, [])

    @property
    def raw_logprobs(self) -> list[tuple[int, float, int]]:
        """Of sample 0, to be compared to the bit."""
        return [(entry.token_id, entry.logprob, entry.rank) for entry in self.logprobs.get(0, [])]

    def add(self, event: Event) -> None:
        match event:
            case Accepted():
                earlier = self.accepted.prompt_logprobs if self.accepted else ()
                self.accepted = msgspec.structs.replace(event, prompt_logprobs=(*earlier, *event.prompt_logprobs))
            case Delta(index=index):
                assert index not in self.ends, "nothing follows a sample's end"
                self.tokens.setdefault(index, []).extend(event.token_ids)
                self.texts[index] = self.texts.get(index, "") + event.text
                self.logprobs.setdefault(index, []).extend(event.logprobs)
            case Finished(index=index):
                assert index not in self.ends, "a sample ends once"
                self.ends[index] = event


async def collect(
    client: Client,
    request: Request,
    *,
    timeout_s: float = 120.0,
    on_delta: Callable[[Answer], None] | None = None,
) -> Answer:
    """The whole answer, whatever its end. `on_delta` is called after each piece."""
    answer = Answer()
    try:
        async for event in client.generate(request, timeout_s=timeout_s):
            answer.add(event)
            if on_delta and isinstance(event, Delta):
                on_delta(answer)
    except CallError as error:
        answer.status, answer.error = error.status, error
    return answer


def ask_all(address: str, requests: Sequence[Request], **options: object) -> list[Answer]:
    """All requests at once, on one channel; their answers in order."""

    async def run() -> list[Answer]:
        async with Client(address) as client:
            return list(await asyncio.gather(*(collect(client, request, **options) for request in requests)))  # type: ignore[arg-type]

    return asyncio.run(run())


def ask_one(address: str, request: Request, **options: object) -> Answer:
    return ask_all(address, [request], **options)[0]
