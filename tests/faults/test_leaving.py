"""Clients that leave, that do not read, that have no time: nobody else notices, and nothing is left behind."""

import asyncio
import random
import time

import psutil
import pytest

from services.cli.client import CallError, Client, Delta, Request
from tests.builders.answers import ask_all, ask_one, collect
from tests.builders.cluster import RunningCluster
from tests.counts import count

pytestmark = pytest.mark.cluster

LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
CONCURRENT = 16
GROWTH_BYTES = 48 * 2**20
"""What a process may gain over all the cancels: caches fill, leaks would go on."""
ABORT_MS = 50


def prompt(seed: int, length: int = 20) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(2, 384) for _ in range(length))


def resident_bytes(cluster: RunningCluster) -> dict[str, int]:
    return {name: psutil.Process(pid).memory_info().rss for name, pid in cluster.ready["pids"].items()}


async def leave_after(client: Client, seed: int) -> None:
    """Cancels at a random point: at once, before the first token, or after some."""
    rng = random.Random(seed)
    request = Request(token_ids=prompt(seed, rng.randrange(1, 80)), n=1 + (seed % 5 == 0), **LONG)
    stay = rng.choice((0, 0, 1, 3, 10))
    if stay == 0:
        task = asyncio.create_task(collect(client, request))
        await asyncio.sleep(rng.random() * 0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return
    async for event in client.generate(request):
        stay -= isinstance(event, Delta)
        if stay <= 0:
            break


async def leave_often(address: str, seeds: range) -> None:
    places = asyncio.Semaphore(CONCURRENT)
    async with Client(address) as client:

        async def one(seed: int) -> None:
            async with places:
                await leave_after(client, seed)

        await asyncio.gather(*(one(seed) for seed in seeds))


def test_clients_that_cancel_anywhere_leave_nothing_behind(cluster, twin: dict) -> None:
    running = cluster(**twin)
    cancels = count("cluster_cancels")
    asyncio.run(leave_often(running.address, range(10_000, 10_240)))
    running.assert_idle()
    before = resident_bytes(running)
    asyncio.run(leave_often(running.address, range(100, 100 + cancels)))
    running.assert_idle()
    after = resident_bytes(running)
    assert {name: after[name] - before[name] for name in after if after[name] - before[name] > GROWTH_BYTES} == {}


def test_a_client_that_leaves_frees_its_blocks_within_two_steps_and_50_ms(cluster, twin: dict) -> None:
    running = cluster(**twin)

    async def leave() -> float:
        async with Client(running.address) as client:
            events = client.generate(Request(token_ids=prompt(1), **LONG))
            step_s, last = 0.0, time.monotonic()
            seen = 0
            async for event in events:
                if isinstance(event, Delta):
                    now = time.monotonic()
                    step_s, last, seen = max(step_s, now - last) if seen > 1 else 0.0, now, seen + 1
                    if seen > 10:
                        break
            await events.aclose()
            left = time.monotonic()
            while any(group.kv_blocks_referenced for group in (await client.load()).groups):
                assert time.monotonic() - left < 5
            return (time.monotonic() - left) * 1e3 - 2 * step_s * 1e3

    late_ms = sorted(asyncio.run(leave()) for _ in range(5))
    assert late_ms[2] <= ABORT_MS, late_ms


def test_a_client_that_does_not_read_slows_nobody(cluster, twin: dict) -> None:
    running = cluster(**twin)

    async def together() -> tuple[float, float]:
        async with Client(running.address) as idle, Client(running.address) as client:
            request = Request(token_ids=prompt(2), max_tokens=100, ignore_eos=True, temperature=0.0)
            began = time.monotonic()
            await collect(client, request)
            alone_s = time.monotonic() - began
            unread = idle.generate(Request(token_ids=prompt(3), logprobs=20, **LONG))
            await anext(unread)
            began = time.monotonic()
            answer = await collect(client, request)
            beside_s = time.monotonic() - began
            assert answer.status == "OK"
            await unread.aclose()
            return alone_s, beside_s

    pairs = [asyncio.run(together()) for _ in range(3)]
    ratio = sorted(beside / alone for alone, beside in pairs)[1]
    assert ratio < 3.0, pairs  # two rows a step instead of one, on a busy machine


def test_an_impossible_deadline_is_refused_at_once(cluster, twin: dict) -> None:
    running = cluster(**twin)
    for i in range(3):  # the scheduler learns its pace
        ask_one(running.address, Request(token_ids=prompt(i), max_tokens=20, ignore_eos=True))
    began = time.monotonic()
    answer = ask_one(running.address, Request(token_ids=prompt(9), **LONG), timeout_s=0.3)
    assert answer.status == "DEADLINE_EXCEEDED" and time.monotonic() - began < 0.25
    assert "allow more time or ask for fewer tokens" in answer.error.message and answer.only == []


def test_a_deadline_ends_a_stream_in_time(cluster, twin: dict) -> None:
    running = cluster(**twin)
    began = time.monotonic()
    answer = ask_one(running.address, Request(token_ids=prompt(4), n=8, **LONG), timeout_s=0.15)
    assert answer.status == "DEADLINE_EXCEEDED" and time.monotonic() - began < 2.0
    running.assert_idle()


def test_a_full_router_sheds_with_a_retry_delay_and_serves_again(cluster, twin: dict) -> None:
    running = cluster(**{**twin, "max_num_queued_reqs": 8})
    requests = [Request(token_ids=prompt(i), max_tokens=60, ignore_eos=True, temperature=0.0) for i in range(40)]
    answers = ask_all(running.address, requests)
    statuses = {answer.status for answer in answers}
    assert statuses == {"OK", "RESOURCE_EXHAUSTED"}
    assert all(answer.error.retry_after_ms > 0 for answer in answers if answer.status != "OK")
    assert ask_one(running.address, requests[0]).status == "OK"


def test_abort_by_id_ends_the_stream(cluster, twin: dict) -> None:
    running = cluster(**twin)

    async def abort() -> tuple[str, bool, bool]:
        async with Client(running.address) as client:
            request = Request(token_ids=prompt(5), request_id="to-be-ended", **LONG)
            events = client.generate(request)
            await anext(events)
            found = await client.abort("to-be-ended")
            try:
                async for _ in events:
                    pass
                status = "OK"
            except CallError as error:
                status = error.status
            return status, found, await client.abort("to-be-ended")

    status, found, again = asyncio.run(abort())
    assert (status, found, again) == ("CANCELLED", True, False)
