"""A router whose model says what a test wants, in chats with tools and reasoning."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shared.text.tokenizer import Tokenizer, load_tokenizer
from tests.builders.fake_scheduler import FakeRequest, FakeScheduler
from tests.builders.http import asking, events
from tests.builders.router import running_router
from tests.builders.tool_text import VOCAB_SIZE, write_tool_model

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the fox"}]
EOS = 1


@dataclass
class Saying:
    """A router whose model says `says`."""

    client: httpx.AsyncClient
    scheduler: FakeScheduler
    tokenizer: Tokenizer
    says: str = ""
    ends: bool = True
    base_url: str = ""

    def answer(self, request: FakeRequest, index: int) -> list[int]:
        tokens = self.tokenizer.encode(self.says, add_special_tokens=False)
        return [*tokens, EOS] if self.ends else tokens

    async def post(self, says: str, *, ends: bool = True, status: int = 200, **ask: Any) -> httpx.Response:
        self.says, self.ends = says, ends
        said = await self.client.post(PATH, json={"messages": HELLO, **ask})
        assert said.status_code == status, said.text
        return said

    async def choice(self, says: str, **ask: Any) -> dict[str, Any]:
        """The first choice of a whole body, which a stream of the same answer equals."""
        [whole] = (await self.post(says, **ask)).json()["choices"]
        assert joined(events((await self.post(says, **ask, stream=True)).text)) == without_ids(whole)
        return whole

    def prompt(self) -> str:
        """What the model was given last."""
        return self.tokenizer.decode(self.scheduler.requests[-1].token_ids, skip_special_tokens=False)


@asynccontextmanager
async def saying(folder: Path, template: str, **settings: Any) -> AsyncIterator[Saying]:
    model = write_tool_model(folder / "m", template)
    scheduler = FakeScheduler(vocab_size=VOCAB_SIZE, max_model_len=4096)
    async with running_router(model, scheduler, **settings) as router, asking(router) as client:
        one = Saying(client, scheduler, load_tokenizer(model), base_url=f"http://{router.http}/v1")
        scheduler.answer = one.answer
        yield one


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The one choice that chunks tell, without ids."""
    message: dict[str, Any] = {"content": ""}
    calls: dict[int, dict[str, str]] = {}
    ends = []
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                assert delta[name] or delta.get("role")
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if call["index"] not in calls:
                assert call["index"] == len(calls) and call["type"] == "function" and call["id"]
                calls[call["index"]] = {"name": call["function"]["name"], "arguments": ""}
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    if calls:
        message["tool_calls"] = list(calls.values())
    message["content"] = message["content"] or (None if len(message) > 1 else "")
    return {"message": message, "ends": ends}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """A whole body's choice as `joined` gives it."""
    message = {key: value for key, value in choice["message"].items() if key not in ("role", "refusal")}
    if "tool_calls" in message:
        assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
        message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return {"message": message, "ends": [choice["finish_reason"]]}
