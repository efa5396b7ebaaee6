"""Many streams at once from a few client processes, so that the client is not what is measured.

Moments are of `time.perf_counter`, which on Linux is one clock for all processes.
"""

import asyncio
import contextlib
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from ops.bench.workload import FIRST_ID, Job
from services.cli.client import Client, Delta, Finished, Logprobs, Request

HEAD_START_S = 0.3
"""From the order to the first request: every process has connected by then. One alone need not wait."""
GRACE_S = 15.0
"""Beyond its limit a client process is given up."""


class Stream(msgspec.Struct):
    """One request as its client saw it: when tokens came and how many, or what went wrong. What came only for a job
    that keeps it."""

    sent_s: float = 0.0
    arrivals: list[tuple[float, int]] = []
    cached_tokens: int = 0
    error: str = ""
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]


class Answers(msgspec.Struct):
    """All streams of one load, and the CPU seconds of each client process."""

    streams: list[Stream]
    client_cpu_s: list[float]

    @property
    def begin_s(self) -> float:
        return min(stream.sent_s for stream in self.streams)

    @property
    def wall_s(self) -> float:
        return max(stream.last_s for stream in self.streams) - self.begin_s

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)


class Clients:
    """Client processes that stay for many loads. A context manager."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = self._start()

    def _start(self) -> Any:
        return multiprocessing.get_context("spawn").Pool(self._count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()

    def run(self, address: str, jobs: Sequence[Job], limit_s: float, at_once: int = 0) -> Answers:
        """All jobs at once, or `at_once` of them; streams in the order of their jobs. Raises RuntimeError where one
        fails or the time is up."""
        at_once = min(at_once or len(jobs), len(jobs))
        shares = self.shares(at_once)
        count = len(shares)
        begin_s = time.perf_counter() + (HEAD_START_S if count > 1 else 0.0)
        orders = [(address, list(jobs[n::count]), begin_s, limit_s, share) for n, share in enumerate(shares)]
        done: list[tuple[list[Stream], float]] = self.call(drive, orders, limit_s)
        streams = [Stream() for _ in jobs]
        for n, (found, _) in enumerate(done):
            streams[n::count] = found
        answers = Answers(streams, [cpu_s for _, cpu_s in done])
        failed = [stream.error for stream in answers.streams if stream.error]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(jobs)} requests failed, {answers.tokens} tokens came: {failed[0]}"
            )
        return answers

    def shares(self, at_once: int) -> list[int]:
        """So many requests at once, split among the processes."""
        count = min(self._count, at_once)
        return [at_once // count + (n < at_once % count) for n in range(count)]

    def call(self, function: Callable[..., Any], orders: Sequence[tuple[Any, ...]], limit_s: float) -> list[Any]:
        """What `function` returns of each order, which is one process's. Raises RuntimeError where one hangs."""
        pending = self._pool.starmap_async(function, orders, chunksize=1)
        try:
            done: list[Any] = pending.get(limit_s + GRACE_S)
        except multiprocessing.TimeoutError:
            self._pool.terminate()
            self._pool = self._start()
            raise RuntimeError(f"the clients hung for {limit_s + GRACE_S:.0f} s") from None
        return done


def drive(address: str, jobs: list[Job], begin_s: float, limit_s: float, at_once: int) -> tuple[list[Stream], float]:
    """What one client process does: its streams, and the CPU seconds that they took."""
    return asyncio.run(_drive(address, jobs, begin_s, limit_s, at_once))


async def _drive(
    address: str, jobs: list[Job], begin_s: float, limit_s: float, at_once: int
) -> tuple[list[Stream], float]:
    streams, places = [Stream() for _ in jobs], asyncio.Semaphore(at_once)

    async def run(client: Client, job: Job, stream: Stream) -> None:
        async with places:
            await follow(client, job, stream)

    async with Client(address) as client:
        try:
            await client.connect(10)
        except Exception as error:
            return [Stream(error=str(error)) for _ in jobs], 0.0
        await asyncio.sleep(max(0.0, begin_s - time.perf_counter()))
        cpu_s = time.process_time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*(run(client, job, stream) for job, stream in zip(jobs, streams, strict=True)))
        cpu_s = time.process_time() - cpu_s
    for job, stream in zip(jobs, streams, strict=True):
        if not stream.error and stream.tokens != job.max_tokens:
            stream.error = f"{stream.tokens} of {job.max_tokens} tokens came within {limit_s:.0f} s"
    return streams, cpu_s


async def follow(client: Client, job: Job, stream: Stream) -> None:
    """Asks for one job, and notes in `stream` what comes."""
    fields: dict[str, Any] = {"temperature": 0.0, **job.fields}
    request = Request(
        token_ids=job.token_ids,
        max_tokens=job.max_tokens,
        ignore_eos=True,
        deterministic=job.deterministic,
        **fields,
    )
    arrivals: list[tuple[float, int]] = []
    stream.arrivals, stream.sent_s = arrivals, time.perf_counter()
    try:
        async with contextlib.aclosing(client.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    arrivals.append((time.perf_counter(), len(event.token_ids)))
                    if job.keeps:
                        stream.token_ids += event.token_ids
                        stream.logprobs += event.logprobs
                    if job.leave_after and stream.tokens >= job.leave_after:
                        return
                elif isinstance(event, Finished) and event.usage is not None:
                    stream.cached_tokens = event.usage.cached_tokens
    except Exception as error:
        stream.error = f"{type(error).__name__}: {error}"[:300]


def draw_ids(seed: object, count: int, vocab_size: int) -> tuple[int, ...]:
    """Random token ids, the same for the same seed."""
    return tuple(random.Random(str(seed)).choices(range(FIRST_ID, vocab_size), k=count))


def steady_rate(answers: Answers) -> float | None:
    """Tokens a second from the last request's first token to the first request's end; None where these overlap not."""
    begin_s = max(stream.first_s for stream in answers.streams)
    end_s = min(stream.last_s for stream in answers.streams)
    if end_s <= begin_s:
        return None
    arrivals = (arrival for stream in answers.streams for arrival in stream.arrivals)
    return sum(count for moment, count in arrivals if begin_s < moment <= end_s) / (end_s - begin_s)


def median_tpot_ms(answers: Answers) -> float | None:
    """From a request's first tokens to its last, per token after the first; of the median request."""
    times = [
        (stream.last_s - stream.first_s) * 1e3 / (stream.tokens - stream.arrivals[0][1])
        for stream in answers.streams
        if stream.tokens > stream.arrivals[0][1]
    ]
    return statistics.median(times) if times else None
