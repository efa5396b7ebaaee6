"""The loop around the core, without processes: what happens when the books are in doubt."""

import asyncio

import pytest

from services.scheduler import loop as loop_module
from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from services.scheduler.loop import Loop
from services.scheduler.publish import Publisher
from shared.clock import monotonic_ns
from tests.builders.core_driver import submission


class FakeWorkers:
    """Takes plans, and forgets a worker that it is told to give up."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.given_up: list[str] = []
        self.loop: Loop | None = None

    def send(self, group: str, plan: StepPlan) -> None:
        self.plans.append(plan)

    def give_up(self, group: str, reason: str) -> None:
        self.given_up.append(group)
        self.loop.on_lost(group, reason)


def make_loop() -> tuple[Loop, Scheduler, FakeWorkers]:
    core, workers = Scheduler(CoreConfig()), FakeWorkers()
    publisher = Publisher(monotonic_ns, stall_timeout_ns=10**10)
    errors: list[BaseException] = []
    loop = Loop(core, workers, publisher, max_plans_in_flight=1, now_ns=monotonic_ns, fatal=errors.append)
    publisher.loads = loop.loads
    workers.loop = loop
    loop.on_ready(GroupSpec(id="g", num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=64))
    return loop, core, workers


async def answer_one(loop: Loop, workers: FakeWorkers) -> None:
    loop.submit(submission((1, 1), range(5), max_tokens=1))
    await asyncio.sleep(0)
    loop.on_result("g", StepResult(step=workers.plans[-1].step, tokens=[7]))
    await asyncio.sleep(0.01)


@pytest.fixture
def checked(monkeypatch):
    """Each check of the books: whether requests were there."""
    checks: list[bool] = []
    find = loop_module.violations
    monkeypatch.setattr(loop_module, "violations", lambda core: checks.append(bool(core.requests)) or find(core))
    return checks


def test_a_sound_core_keeps_its_workers_once_it_has_been_idle(monkeypatch, checked):
    monkeypatch.setattr(loop_module, "IDLE_CHECK_S", 0.02)

    async def run() -> None:
        loop, _, workers = make_loop()
        await answer_one(loop, workers)
        await asyncio.sleep(0.1)
        assert checked == [False]
        assert loop.num_violations == 0 and workers.given_up == [] and loop.ready

    asyncio.run(run())


def test_a_violated_invariant_is_counted_and_the_workers_start_afresh(monkeypatch):
    monkeypatch.setattr(loop_module, "IDLE_CHECK_S", 0.02)

    async def run() -> None:
        loop, core, workers = make_loop()
        core.groups["g"].pool.free.append(0)  # a block that is free twice
        await answer_one(loop, workers)
        await asyncio.sleep(0.1)
        assert loop.num_violations > 0 and workers.given_up == ["g"] and not core.groups

    asyncio.run(run())


def test_no_request_that_follows_another_waits_for_the_books_to_be_checked(monkeypatch, checked):
    """A check takes milliseconds per 10,000 blocks: it would hold back the last tokens and whoever asks next."""
    monkeypatch.setattr(loop_module, "IDLE_CHECK_S", 0.2)

    async def run() -> None:
        loop, _, workers = make_loop()
        for _ in range(30):  # for longer than the wait
            await answer_one(loop, workers)
        assert checked == []
        await asyncio.sleep(0.3)
        assert checked == [False]

    asyncio.run(run())


def test_a_stale_link_is_stalled_only_once_it_holds_something():
    async def run() -> None:
        now = [0]
        publisher = Publisher(lambda: now[0], stall_timeout_ns=100)
        link = publisher.open("router")
        link.frame, link.num_unsent = type(link.frame)(), 0
        now[0] = 1000
        assert publisher.stalled() == []
        from services.scheduler.core.events import PlainTokens

        publisher.publish([PlainTokens([((link.number, 1), 0)], [5])])
        assert publisher.stalled() == []
        now[0] = 1200
        assert publisher.stalled() == [link]

    asyncio.run(run())


def test_loads_are_read_behind_a_plan_only():
    """A timer that reads them would now and then count a request that has just come as one that waits."""

    async def run() -> None:
        reads, turns = [], []
        publisher = Publisher(monotonic_ns, stall_timeout_ns=10**10)
        publisher.open("router")
        publisher.loads = lambda: reads.append("read") or []
        publisher.request_turn = lambda: turns.append("turn")
        publisher.publish([])
        publisher.publish([])
        await asyncio.sleep(0.1)
        assert (reads, turns) == (["read"], ["turn"])
        publisher.publish([])
        assert reads == ["read", "read"]

    asyncio.run(run())


def test_an_error_under_any_call_that_touches_the_core_is_fatal():
    async def run() -> None:
        loop, core, _ = make_loop()
        errors: list[BaseException] = []
        loop.fatal = errors.append
        core.groups["g"].pool = None  # whatever reads the books now raises
        loop.on_lost("g", "its lease ran out")
        loop.submit(submission((1, 1), range(5)))
        assert len(errors) == 2

    asyncio.run(run())
