"""Several router processes on the same ports are one router to whoever asks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
import pytest

from services.cli.client import CallError, Client, Request
from tests.builders.answers import collect
from tests.builders.cluster import RunningCluster, wait_for
from tests.builders.scrape import scrape

pytestmark = pytest.mark.cluster

TWO = {"router_processes": 2}
CLIENTS = 12
"""Connections are spread by the kernel: that twelve all lead to one of two happens once in 2,000 times."""


@contextlib.asynccontextmanager
async def clients_of_both(cluster: RunningCluster) -> AsyncIterator[tuple[Client, Client]]:
    """A client of each process."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, Client] = {}
        for _ in range(CLIENTS):
            client = await stack.enter_async_context(cluster.client())
            found[(await client.server_info()).instance] = client
        assert len(found) == 2
        first, second = found.values()
        yield first, second


def test_what_one_process_did_the_other_tells(cluster) -> None:
    running = cluster(**TWO)

    async def run() -> None:
        async with clients_of_both(running) as (one, other):
            await collect(one, Request(prompt="def a(", max_tokens=6, ignore_eos=True, request_id="by-one"))
            await collect(other, Request(prompt="def b(", max_tokens=6, ignore_eos=True, request_id="by-other"))
            for client in (one, other):
                names = [trace.request_id for trace in await client.traces(2)]
                assert names == ["by-other", "by-one"], "the newest first, whoever served it"
                assert [trace.request_id for trace in await client.traces(5, "by-one")] == ["by-one"]

    asyncio.run(run())
    counted = [scrape(running.http("router")) for _ in range(6)]
    assert {said("generation_tokens_total") for said in counted} == {counted[0]("generation_tokens_total")}
    assert counted[0]("generation_tokens_total") >= 12


def test_a_request_is_seen_and_ended_from_the_other_process(cluster) -> None:
    async def run() -> None:
        async with clients_of_both(cluster(**TWO)) as (one, other):
            endless = Request(prompt="x", max_tokens=1500, ignore_eos=True, request_id="endless")
            begun = asyncio.Event()
            asking = asyncio.create_task(collect(one, endless, on_delta=lambda _: begun.set()))
            await begun.wait()
            assert (await one.load()).requests_in_flight == (await other.load()).requests_in_flight == 1
            assert await other.abort("endless")
            assert (await asking).status == "CANCELLED"
            assert not await other.abort("endless-no-more")

    asyncio.run(run())


def test_a_process_that_dies_is_restarted_while_the_other_serves(own_cluster) -> None:
    with own_cluster(**TWO) as running:
        parent = psutil.Process(running.pid("router"))
        wait_for(lambda: len(parent.children()) == 2, 5, "two processes")
        victim = parent.children()[0]
        victim.kill()
        psutil.wait_procs([victim], 5)  # from now on the kernel sends nobody there

        async def ask() -> set[str]:
            ends = set()
            for _ in range(8):  # each over a connection of its own
                async with running.client() as client:
                    ends.add((await collect(client, Request(prompt="def f(", max_tokens=4, temperature=0))).status)
            return ends

        assert asyncio.run(ask()) <= {"OK"}
        wait_for(
            lambda: len(parent.children()) == 2 and victim.pid not in {c.pid for c in parent.children()}, 30, "two"
        )
        assert "was killed by SIGKILL" in running.log_file.read_text()


def test_a_drain_told_to_one_ends_both_and_the_cluster(own_cluster) -> None:
    with own_cluster(**TWO) as running:

        async def run() -> str:
            async with clients_of_both(running) as (one, other):
                request = Request(prompt="x", max_tokens=100, ignore_eos=True)
                begun = asyncio.Event()
                asking = asyncio.create_task(collect(one, request, on_delta=lambda _: begun.set()))
                await begun.wait()
                assert await other.drain() == 1
                status = (await asking).status
                with pytest.raises(CallError):
                    await collect_strictly(one)
                return status

        assert asyncio.run(run()) == "OK", "what was in flight ended well"
        assert running.process.wait(30) == 0


async def collect_strictly(client: Client) -> None:
    async for _ in client.generate(Request(prompt="late", max_tokens=1), timeout_s=5):
        pass
