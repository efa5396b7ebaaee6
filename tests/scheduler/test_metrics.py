"""What the scheduler exports: read as Prometheus reads it, with pretend workers."""

import asyncio

import pytest

from services.cli.ports import free_port
from services.scheduler.core.plan import StepResult
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from services.scheduler.metrics import StepMeter
from shared.clock import NS_PER_MS
from shared.telemetry.metrics import EXPORTED
from tests.builders.core_driver import submission
from tests.builders.link import linked, running_scheduler, running_worker
from tests.builders.scrape import Scrape, scrape


async def read(port: int) -> Scrape:
    return await asyncio.to_thread(scrape, f"127.0.0.1:{port}")


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def plan():
    core = Scheduler(CoreConfig())
    core.add_group(GroupSpec(id="g", num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=64), 0)
    core.submit(submission("a", range(9)), 0)
    return core.schedule("g", 0)


def meter(*steps: tuple[float, float, float, bool]) -> StepMeter:
    """Steps as (sent, answered, ran, busy), in milliseconds, told in the order in which they happen."""
    metered, one = StepMeter(), plan()
    moments = [(sent, 0, step) for step in steps for sent in (step[0],)] + [(step[1], 1, step) for step in steps]
    for at, kind, (_, _, ran, busy) in sorted(moments, key=lambda moment: moment[:2]):
        if kind == 0:
            metered.on_sent("g", one, int(at * NS_PER_MS))
        else:
            result = StepResult(step=1, run_ns=int(ran * NS_PER_MS))
            metered.on_result("g", result, busy, int(at * NS_PER_MS))
    return metered


def test_a_step_is_as_long_as_the_worker_says_and_as_large_as_its_plan():
    metered = meter((0, 12, 10, True))
    assert metered.run.total == pytest.approx(0.010)
    assert metered.tokens.total == 9


def test_the_gap_is_what_a_busy_worker_did_not_compute_between_two_results():
    assert meter((0, 12, 10, True)).gap.total == pytest.approx(0.002)  # the way there and back
    assert meter((0, 12, 10, True), (1, 22, 10, True)).gap.total == pytest.approx(0.002)  # the next one waited there
    assert meter((0, 12, 10, True), (13, 26, 10, True)).gap.total == pytest.approx(0.006)


def test_an_idle_worker_makes_no_gap():
    assert meter((0, 12, 10, False), (500, 512, 10, True)).gap.total == pytest.approx(0.004)


def test_a_failed_step_is_no_step_and_the_next_one_begins_afresh():
    metered = StepMeter()
    one = plan()
    metered.on_sent("g", one, 0)
    metered.on_sent("g", one, 1)
    metered.on_result("g", StepResult(step=1, error="boom"), True, 5 * NS_PER_MS)
    metered.on_sent("g", one, 100 * NS_PER_MS)
    metered.on_result("g", StepResult(step=2, run_ns=NS_PER_MS), True, 102 * NS_PER_MS)
    assert metered.run.total == pytest.approx(0.001)
    assert metered.gap.total == pytest.approx(0.001)


def test_a_result_of_a_worker_that_was_lost_is_passed_over():
    metered = StepMeter()
    metered.on_sent("g", plan(), 0)
    metered.on_lost("g")
    metered.on_result("g", StepResult(step=1, run_ns=1), True, 5)
    assert sum(metered.run.counts) == 0


def test_the_scheduler_exports_its_metrics_and_no_other():
    async def scenario() -> None:
        port = free_port()
        async with running_scheduler(metrics_port=port):
            said = await read(port)
        exported = {metric.name: metric.kind for metric in EXPORTED["scheduler"]}
        assert said.kinds == exported
        assert said("kv_cache_usage_perc") == 0
        assert said.labels("kv_blocks", "state") == {"free": 0, "cached": 0, "referenced": 0}
        assert said.labels("heartbeat_age_seconds", "worker") == {}
        assert set(said.labels("num_requests_waiting_by_reason", "reason")) == {
            "step",
            "budget",
            "blocks",
            "max_num_seqs",
            "priority",
            "grammar",
            "worker_lost",
        }
        assert said.labels("num_preemptions_total", "reason") == {"blocks": 0, "step_failed": 0, "worker_lost": 0}
        assert said.labels("migrations_total", "result") == {"moved": 0, "failed": 0}
        assert said.labels("aborts_total", "phase") == {"queue": 0, "prefill": 0, "decode": 0}

    run(scenario())


def test_gauges_say_who_runs_who_waits_and_what_they_hold():
    async def scenario() -> None:
        port = free_port()
        async with (
            running_scheduler(metrics_port=port, max_num_seqs=1) as scheduler,
            running_worker(scheduler, num_blocks=32, step_ms=20),
            linked(scheduler) as link,
        ):
            for key in range(3):
                link.submit(key, range(20 * key, 20 * key + 40), max_tokens=100)
            await link.until(lambda: 0 in link.heard)
            said = await read(port)
            assert (said("num_requests_running"), said("num_requests_waiting")) == (1, 2)
            assert said.labels("num_requests_waiting_by_reason", "reason")["max_num_seqs"] == 2
            blocks = said.labels("kv_blocks", "state")
            assert sum(blocks.values()) == 32 and blocks["referenced"] >= 3
            assert said("kv_cache_usage_perc") == blocks["referenced"] / 32
            [age] = said.labels("heartbeat_age_seconds", "worker").values()
            assert 0 <= age < 2
            for key in (1, 2, 0):  # the one that runs last: else the next one may begin before its abort is there
                link.abort(key)
            await link.released(0, 1, 2)
            said = await read(port)
            assert said.labels("aborts_total", "phase") == {"queue": 2, "prefill": 0, "decode": 1}
            await link.until(lambda: bool(link.loads) and not link.loads[0].requests_running)
            assert said("num_requests_running") == said("num_requests_waiting") == 0

    run(scenario())


def test_steps_and_lookups_are_counted():
    async def scenario() -> None:
        port = free_port()
        async with (
            running_scheduler(metrics_port=port) as scheduler,
            running_worker(scheduler, step_ms=2),
            linked(scheduler) as link,
        ):
            for key in range(2):
                link.submit(key, range(20, 60), max_tokens=7)
                await link.released(key)
            said = await read(port)
        assert (said("prefix_cache_queries_total"), said("prefix_cache_hits_total")) == (80, 32)
        steps = said("step_seconds_count")
        assert steps == said("iteration_tokens_total_count") == said("step_gap_seconds_count") >= 14
        assert said("step_seconds_sum") >= 0.002 * steps
        assert said("iteration_tokens_total_sum") >= 40 + 8 + 2 * 6

    run(scenario())
