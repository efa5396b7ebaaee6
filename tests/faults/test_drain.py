"""SIGTERM to a router: what runs finishes, what is new is refused, and the process ends with 0."""

import asyncio
import signal
import time

import pytest

from services.cli.client import Client, Request
from tests.builders.answers import collect
from tests.builders.cluster import is_alive, wait_for

pytestmark = pytest.mark.cluster

RUNNING = Request(token_ids=(5, 6, 7), max_tokens=300, ignore_eos=True, temperature=0.0)


@pytest.mark.parametrize("timeout_s", [20.0, 0.3])
def test_a_drained_router_finishes_what_it_has_or_says_why_not(own_cluster, twin: dict, timeout_s: float) -> None:
    with own_cluster(**twin, shutdown_timeout=timeout_s) as cluster:
        pid = cluster.pid("router")

        async def run() -> tuple[object, object]:
            async with Client(cluster.address) as client:
                first = asyncio.Event()
                running = asyncio.create_task(collect(client, RUNNING, on_delta=lambda _: first.set()))
                await asyncio.wait_for(first.wait(), 30)
                cluster.kill_service("router", signal.SIGTERM)
                await asyncio.sleep(0.1)
                late = await collect(client, RUNNING)
                return await running, late

        running, late = asyncio.run(run())
        assert late.status == "UNAVAILABLE" and late.only == []
        if timeout_s > 1:
            assert running.status == "OK" and len(running.only) == 300
        else:
            assert running.status == "UNAVAILABLE" and 0 < len(running.only) < 300
            assert running.ends[0].reason == "abort"
        wait_for(lambda: not is_alive(pid), 10, "the router has ended")
        assert cluster.process.wait(30) == 0


def test_a_second_signal_ends_a_drain_at_once(own_cluster, twin: dict) -> None:
    with own_cluster(**twin, shutdown_timeout=60.0) as cluster:
        pid = cluster.pid("router")

        async def run() -> None:
            async with Client(cluster.address) as client:
                first = asyncio.Event()
                slow = Request(token_ids=(5, 6, 7), n=8, max_tokens=450, ignore_eos=True)
                running = asyncio.create_task(collect(client, slow, on_delta=lambda _: first.set()))
                await asyncio.wait_for(first.wait(), 30)
                cluster.kill_service("router", signal.SIGTERM)
                await asyncio.sleep(0.1)
                began = time.monotonic()
                cluster.kill_service("router", signal.SIGTERM)
                await running
                assert time.monotonic() - began < 2.0

        asyncio.run(run())
        wait_for(lambda: not is_alive(pid), 5, "the router has ended")
