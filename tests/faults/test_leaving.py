"""Clients that leave, that do not read, that have no time: nobody else notices, and nothing is left behind."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc
import psutil
import pytest

from services.cli.client import CallError, Client, Delta, Request
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1 import inference_pb2_grpc
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


TINY_WINDOW = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
"""A connection whose client buffers as little as gRPC allows: what it does not read piles up at the router."""
WORDY = 2
"""Requests of much text each: 8 samples of 160 tokens with 20 logprobs are 0.4 MB."""


def wordy(seed: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt(seed)),
        sampling=pb.Sampling(n=8, temperature=1, seed=seed),
        stopping=pb.Stopping(max_tokens=160, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=20),
    )


@dataclass
class Read:
    """A wordy request's answer: how many messages it came in, and its tokens with their logprobs by sample."""

    messages: int = 0
    tokens: dict[int, list[tuple[int, float]]] = field(default_factory=dict)


async def read_all(call: grpc.aio.UnaryStreamCall) -> Read:
    found = Read()
    async for response in call:
        found.messages += 1
        tokens = found.tokens.setdefault(response.delta.index, [])
        tokens += [(one.token_id, one.logprob) for one in response.delta.logprobs]
    return found


async def beside_wordy(address: str, *, read: bool) -> tuple[float, list[Read]]:
    """How long a short answer takes beside wordy ones, which are read as they come, or when they are all there."""
    async with grpc.aio.insecure_channel(address, options=TINY_WINDOW) as channel, Client(address) as client:
        calls = [inference_pb2_grpc.InferenceStub(channel).Generate(wordy(seed)) for seed in range(WORDY)]
        reading = [asyncio.create_task(read_all(call)) for call in calls if read]
        await asyncio.gather(*(call.initial_metadata() for call in calls))
        began = time.monotonic()
        answer = await collect(client, Request(token_ids=prompt(2), max_tokens=40, ignore_eos=True, temperature=0.0))
        took_s = time.monotonic() - began
        assert answer.status == "OK"
        while any(group.requests_running for group in (await client.load()).groups):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return took_s, await asyncio.gather(*(reading or map(read_all, calls)))


def test_a_client_that_does_not_read_slows_nobody_and_loses_nothing(cluster, twin: dict) -> None:
    running = cluster(**twin)
    beside_s: dict[bool, list[float]] = {True: [], False: []}
    answers: dict[bool, list[Read]] = {}
    for read in (True, False) * 2:
        took_s, answers[read] = asyncio.run(beside_wordy(running.address, read=read))
        beside_s[read].append(took_s)
    for early, late in zip(answers[True], answers[False], strict=True):
        assert [len(late.tokens[index]) for index in range(8)] == [160] * 8
        assert late.tokens == early.tokens
        assert late.messages < early.messages / 2, "the rest was merged: the buffers were full"
    assert min(beside_s[False]) < 2 * min(beside_s[True]), beside_s


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
