"""Asking a router over HTTP, and reading what it says."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.builders.fake_scheduler import FakeRequest, FakeScheduler
from tests.builders.router import RunningRouter


@asynccontextmanager
async def asking(router: RunningRouter) -> AsyncIterator[httpx.AsyncClient]:
    """A client of this router."""
    async with httpx.AsyncClient(base_url=f"http://{router.http}", timeout=20) as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    """The server-sent events of a stream that ended well."""
    *told, done = read_events(text)
    assert done == "[DONE]"
    return [json.loads(one) for one in told]


def read_events(text: str) -> list[str]:
    """The data of each server-sent event."""
    assert text.endswith("\n\n")
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice, of either kind of chunk."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return found


async def answer_next(scheduler: FakeScheduler, number: int, tokens: list[int], **fields: Any) -> FakeRequest:
    """Answers the number-th request by hand, all tokens in one step."""
    request = await scheduler.request(number)
    request.tokens(tokens, **fields)
    request.end()
    request.release()
    return request
