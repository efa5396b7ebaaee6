"""What one client process does in the case `soak`: keeps requests of random shapes in flight until the time is up."""

import asyncio
import contextlib
import random
import time
from typing import Any

import msgspec

from ops.bench.gpu.clients import Stream, draw_ids, follow
from ops.bench.workload import Job
from services.cli.client import Client

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logprobs": 3},
)
EXACT_SHARE, LEAVING_SHARE, SHARED_SHARE = 0.02, 0.1, 0.25
"""Of all requests; few exact ones, for the steps that hold one are exact for all. Shared: a common prefix is reused."""
LAST_S = 30.0
"""For what is still in flight when the time is up."""


class Soaked(msgspec.Struct):
    """What became of one process's requests. `error`: of the first that failed."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    error: str = ""


def draw(rng: random.Random, vocab_size: int, toy: bool) -> Job:
    """A request of random shape and kind."""
    longest, most = (60, 12) if toy else (2000, 200)
    prompt, outputs = rng.randint(1, longest), rng.randint(1, most)
    shared = rng.random() < SHARED_SHARE
    token_ids = draw_ids("soak" if shared else rng.random(), prompt, vocab_size)
    leave_after = rng.randint(1, 8) if rng.random() < LEAVING_SHARE else 0
    return Job(token_ids, outputs, rng.random() < EXACT_SHARE, rng.choice(KINDS), leave_after=leave_after)


def soak(address: str, seed: int, at_once: int, seconds: float, vocab_size: int, toy: bool) -> Soaked:
    """Keeps `at_once` requests in flight for `seconds`, or until one fails."""
    try:
        return asyncio.run(_soak(address, random.Random(f"soak {seed}"), at_once, seconds, vocab_size, toy))
    except Exception as error:  # not every exception can be handed to another process
        return Soaked(failed=1, error=f"{type(error).__name__}: {error}"[:300])


async def _soak(address: str, rng: random.Random, at_once: int, seconds: float, vocab_size: int, toy: bool) -> Soaked:
    told = Soaked()

    async def ask_on(client: Client) -> None:
        while time.perf_counter() < begin + seconds and not told.failed:
            job, stream = draw(rng, vocab_size, toy), Stream()
            try:
                await follow(client, job, stream)
            except asyncio.CancelledError:
                stream.error = f"not ended {LAST_S:.0f} s after the time was up"
                raise
            finally:
                count(told, job, stream)

    async with Client(address) as client:
        await client.connect(10)
        begin = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + LAST_S):
                await asyncio.gather(*(ask_on(client) for _ in range(at_once)))
        told.wall_s = time.perf_counter() - begin
    return told


def count(told: Soaked, job: Job, stream: Stream) -> None:
    """Adds what became of one request."""
    told.tokens += stream.tokens
    if not stream.error and stream.tokens == job.max_tokens:
        told.finished += 1
    elif not stream.error and 0 < job.leave_after <= stream.tokens:
        told.cancelled += 1
    else:
        told.failed += 1
        told.error = told.error or stream.error or f"{stream.tokens} of {job.max_tokens} tokens came"
