"""Many clients at once: `python -m ops.bench.streams` writes ops/bench/results/streams.json.

`busy`: so many streams answered at the same time, by each door: how they ended, and the router's CPU per token.
`idle`: so many streams accepted and waiting in the scheduler's queue, behind long requests of a higher priority: what
the router's memory grows by. Clients, router, scheduler and worker share this machine's cores.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from ops.bench.cluster import Cluster
from ops.bench.doors import HEAD
from ops.bench.machine import describe, exact_cpu_seconds
from services.cli.client import CallError, Client, Delta, Request

RESULT = Path(__file__).parent / "results" / "streams.json"
CHANNELS = 8
TOKENS = 16
LONG_REQUESTS = 40
OPENING_S = 300.0
STEP, STEP_S = 50, 0.05
"""So many streams begin at once, so often: of more connections than a socket queues the kernel resets some."""
MIB = 2**20
LONGEST_STREAM = 16 * MIB
Hold = Callable[[list[Client], Cluster, int, int, int], Awaitable[None]]
"""Opens a stream (its number, priority and tokens) and reads it to its end."""


async def busy_grpc(cluster: Cluster, streams: int) -> collections.Counter[str]:
    """How the streams ended, and under "tokens" what they brought."""
    ends: collections.Counter[str] = collections.Counter()

    async def one(client: Client, index: int) -> None:
        request = Request(prompt=f"def f{index}(", max_tokens=TOKENS, ignore_eos=True)
        try:
            async for event in client.generate(request, timeout_s=600):
                if isinstance(event, Delta):
                    ends["tokens"] += len(event.token_ids)
            ends["OK"] += 1
        except CallError as error:
            ends[error.status] += 1

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(cluster.address)) for _ in range(CHANNELS)]
        await asyncio.gather(*(one(clients[index % CHANNELS], index) for index in range(streams)))
    return ends


async def busy_http(cluster: Cluster, streams: int) -> collections.Counter[str]:
    host, _, port = cluster.http["router"].rpartition(":")
    ends: collections.Counter[str] = collections.Counter()

    async def one(index: int) -> None:
        ask = {"prompt": f"def f{index}(", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        body = json.dumps({**ask, "stream_options": {"include_usage": True}})
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write((HEAD.format(len(body)) + body).encode())
            said = await reader.readuntil(b"data: [DONE]\n\n")
            writer.close()
        except (OSError, EOFError) as error:
            ends[type(error).__name__] += 1
            return
        ends["OK"] += 1
        ends["tokens"] += int(said[said.rindex(b'"completion_tokens":') :].partition(b":")[2].partition(b",")[0])

    await asyncio.gather(*(one(index) for index in range(streams)))
    return ends


def measure_busy(streams: int) -> dict[str, Any]:
    limits = [f"--max-num-queued-reqs={2 * streams}", "--max-num-seqs=256"]
    cluster = Cluster(["--port=0", "--metrics-port=0", "--threads=1", *limits])
    found: dict[str, Any] = {"streams": streams, "tokens_each": TOKENS}
    try:
        asyncio.run(busy_grpc(cluster, 16))
        for name, door in (("grpc", busy_grpc), ("http", busy_http)):
            before, began = exact_cpu_seconds(cluster.pids["router"]), time.perf_counter()
            ends = asyncio.run(door(cluster, streams))
            took_s, cpu_s = time.perf_counter() - began, exact_cpu_seconds(cluster.pids["router"]) - before
            tokens = ends.pop("tokens", 0)
            found[name] = {
                "ends": dict(ends),
                "seconds": round(took_s, 1),
                "tokens_per_s": round(tokens / took_s),
                "router_cpu_us_per_token": round(cpu_s / max(tokens, 1) * 1e6, 1),
                "router_rss_mib": round(psutil.Process(cluster.pids["router"]).memory_info().rss / MIB),
            }
    finally:
        cluster.close()
    return found


async def hold_grpc(clients: list[Client], cluster: Cluster, index: int, priority: int, tokens: int) -> None:
    request = Request(prompt=f"def f{index}(", max_tokens=tokens, ignore_eos=True, priority=priority)
    async for _ in clients[index % CHANNELS].generate(request):
        pass


async def hold_http(clients: list[Client], cluster: Cluster, index: int, priority: int, tokens: int) -> None:
    host, _, port = cluster.http["router"].rpartition(":")
    ask = {"prompt": f"def f{index}(", "max_tokens": tokens, "ignore_eos": True, "stream": True, "priority": priority}
    body = json.dumps(ask)
    reader, writer = await asyncio.open_connection(host, int(port), limit=LONGEST_STREAM)
    try:
        writer.write((HEAD.format(len(body)) + body).encode())
        await reader.readuntil(b"data: [DONE]\n\n")
    finally:
        writer.close()


async def in_flight(client: Client) -> int:
    return (await client.load(timeout_s=120)).requests_in_flight


def failures(tasks: list[asyncio.Task[None]]) -> dict[str, int]:
    """By what they failed with."""
    return collections.Counter(repr(task.exception()) for task in tasks if task.done() and task.exception())


async def fill(cluster: Cluster, streams: int, hold: Hold) -> dict[str, Any]:
    """Opens the idle streams and weighs the router before and after."""
    router, scheduler = (psutil.Process(cluster.pids[name]) for name in ("router", "scheduler"))

    def weigh() -> list[float]:
        return [process.memory_info().rss / MIB for process in (router, scheduler)]

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(cluster.address)) for _ in range(CHANNELS)]
        held = [asyncio.create_task(hold(clients, cluster, index, 0, 1900)) for index in range(LONG_REQUESTS)]
        await asyncio.sleep(2)
        before, began = weigh(), time.perf_counter()
        for index in range(streams):
            held.append(asyncio.create_task(hold(clients, cluster, index, 1, 4)))
            if index % STEP == 0:
                await asyncio.sleep(STEP_S)
        async with asyncio.timeout(OPENING_S):
            while await in_flight(clients[0]) < sum(not task.done() for task in held):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.2)
        took_s = time.perf_counter() - began
        await asyncio.sleep(2)
        after, load = weigh(), await clients[0].load(timeout_s=120)
        failed = failures(held)
        cancelled = time.perf_counter()
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        while await in_flight(clients[0]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return {
            "streams": streams,
            "in_flight_at_the_router": load.requests_in_flight,
            "waiting_at_the_scheduler": sum(group.requests_waiting for group in load.groups),
            "failed": dict(failed),
            "opened_in_s": round(took_s, 1),
            "all_released_after_cancel_s": round(time.perf_counter() - cancelled, 1),
            "router_rss_mib": [round(before[0]), round(after[0])],
            "router_kib_per_stream": round((after[0] - before[0]) * 1024 / streams, 1),
            "scheduler_rss_mib": [round(before[1]), round(after[1])],
        }


def measure_idle(streams: int, hold: Hold) -> dict[str, Any]:
    limits = [f"--max-num-queued-reqs={2 * streams}", "--max-num-seqs=1", "--scheduling-policy=priority"]
    cluster = Cluster(["--port=0", "--metrics-port=0", "--threads=1", *limits])
    try:
        return asyncio.run(fill(cluster, streams, hold))
    finally:
        cluster.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", type=int, default=2_000)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    idle = {"grpc": measure_idle(options.idle, hold_grpc), "http": measure_idle(options.idle, hold_http)}
    found = {"machine": describe(), "busy": measure_busy(options.busy), "idle": idle}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: found[name] for name in ("busy", "idle")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
