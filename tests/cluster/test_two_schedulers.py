"""Two schedulers behind one router: a request goes where its prefix is warm, cold ones where least waits, and a lost
scheduler's share goes to the other."""

import asyncio
import signal
from pathlib import Path

import pytest

from services.cli.client import Client, Load, Request
from tests.builders.answers import ask_all, ask_one
from tests.builders.cluster import RunningService, wait_for
from tests.models.twins import make_twin

pytestmark = pytest.mark.cluster

SETTINGS = {"threads": 1, "kv_cache_memory_bytes": 32 * 2**20, "dtype": "float32"}


def prompt(seed: int, length: int = 64) -> tuple[int, ...]:
    return tuple(2 + (seed * 37 + i * 11) % 380 for i in range(length))


def load_of(address: str) -> Load:
    async def ask() -> Load:
        async with Client(address) as client:
            return await client.load()

    return asyncio.run(ask())


def test_placement_over_two_schedulers(tmp_path: Path) -> None:
    model = str(make_twin("llama", tmp_path))
    services: list[RunningService] = []

    def start(service: str, name: str, flags: dict) -> dict:
        running = RunningService(service, tmp_path / name, flags)
        services.append(running)
        return running.wait_event("ready")

    try:
        schedulers = [start("scheduler", f"scheduler-{i}", {"port": 0})["address"] for i in range(2)]
        for i, scheduler in enumerate(schedulers):
            start("worker", f"worker-{i}", {"port": 0, "scheduler": scheduler, "model": model, **SETTINGS})
        router = start("router", "router", {"grpc_port": 0, "scheduler": schedulers, "model": model})["grpc"]
        wait_for(lambda: len(load_of(router).groups) == 2, 20, "the router sees both")

        one = Request(token_ids=prompt(1), max_tokens=4, ignore_eos=True, temperature=0.0)
        ask_one(router, one)
        wait_for(lambda: any(g.kv_blocks_cached for g in load_of(router).groups), 5, "a prefix is warm somewhere")
        for i in range(5):
            longer = Request(token_ids=(*prompt(1), 5 + i), max_tokens=4, ignore_eos=True, temperature=0.0)
            assert ask_one(router, longer).ends[0].usage.cached_tokens == 64

        cold = [Request(token_ids=prompt(i), max_tokens=30, ignore_eos=True, temperature=0.0) for i in range(10, 18)]
        assert {answer.status for answer in ask_all(router, cold)} == {"OK"}
        wait_for(lambda: all(g.kv_blocks_cached for g in load_of(router).groups), 5, "both took their share")

        services[0].process.send_signal(signal.SIGKILL)
        wait_for(lambda: len(load_of(router).groups) == 1, 5, "the lost scheduler is gone from the router's view")
        assert {answer.status for answer in ask_all(router, cold)} == {"OK"}
    finally:
        for running in reversed(services):
            if running.process.poll() is None:
                running.stop()
