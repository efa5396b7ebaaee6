"""The supervisor, with pretend services as real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from services.cli.events import write_events
from services.cli.supervise import (
    AllReady,
    Died,
    End,
    Finish,
    GiveUp,
    Line,
    Loading,
    Notice,
    Outcome,
    Ready,
    Restart,
    RestartPolicy,
    ServiceSpec,
    Supervisor,
    judge,
)

FAKE = str(Path(__file__).with_name("fake_service.py"))
POLICY = RestartPolicy(first_delay_s=0.05, longest_delay_s=0.2, quick_s=1.0, max_failed_starts=3)


def make_end(**changes) -> End:
    return End(**{"name": "worker-0", "exit_code": 1, "was_ready": True, "ever_ready": True, "lived_s": 60.0} | changes)


def test_a_child_that_ran_well_restarts_after_the_first_delay() -> None:
    assert judge(make_end(exit_code=-9, quick_deaths=4), POLICY) == Restart(0.05)


def test_the_delay_doubles_while_a_child_keeps_dying_and_has_a_limit() -> None:
    delays = [judge(make_end(lived_s=0.1, quick_deaths=i), POLICY) for i in range(4)]
    assert delays == [Restart(0.05), Restart(0.1), Restart(0.2), Restart(0.2)]


def test_a_refusal_before_the_first_readiness_stops_all_and_says_why() -> None:
    end = make_end(was_ready=False, ever_ready=False, refusal="no such model")
    assert judge(end, POLICY) == GiveUp("worker-0: no such model")


def test_an_exit_before_the_first_readiness_stops_all() -> None:
    assert judge(make_end(was_ready=False, ever_ready=False), POLICY) == GiveUp(
        "worker-0 exited with code 1 before it was ready"
    )


def test_a_child_killed_before_it_was_ready_gets_another_try() -> None:
    assert judge(make_end(exit_code=-9, was_ready=False, ever_ready=False), POLICY) == Restart(0.05)


def test_starts_that_fail_in_a_row_are_given_up() -> None:
    verdict = judge(make_end(was_ready=False, failed_starts=2), POLICY)
    assert isinstance(verdict, GiveUp)
    assert "3 starts in a row failed" in verdict.message


def test_a_drained_router_ends_the_cluster_and_a_crashed_one_does_not() -> None:
    assert judge(make_end(exit_code=0, ends_cluster=True), POLICY) == Finish()
    assert isinstance(judge(make_end(exit_code=1, ends_cluster=True), POLICY), Restart)


class Stage:
    """A supervisor over pretend services, its notices, and the log of their starts and stops."""

    def __init__(self, folder: Path, plays: dict[str, str], policy: RestartPolicy = POLICY, **spec: object) -> None:
        self.runs = folder / "runs"
        self.notices: list[Notice] = []
        specs = [
            ServiceSpec(
                name=name,
                argv=(sys.executable, FAKE, f"--play={play}", f"--runs={self.runs}", f"--name={name}"),
                stop_rank=rank,
                **spec,
            )
            for rank, (name, play) in enumerate(plays.items())
        ]
        self.supervisor = Supervisor(specs, self.notices.append, policy)

    async def until(self, condition) -> None:
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"it did not come; seen: {self.notices}")

    def saw(self, kind: type, times: int = 1) -> bool:
        return sum(isinstance(notice, kind) for notice in self.notices) >= times

    def log(self) -> list[str]:
        return [" ".join(line.split()[:2]) for line in self.runs.read_text().splitlines()]

    def pids(self) -> list[int]:
        return [int(line.split()[2]) for line in self.runs.read_text().splitlines() if " start " in line]


@pytest.fixture
def stage(tmp_path: Path):
    return lambda plays, **spec: Stage(tmp_path, plays, **spec)


def run(scenario) -> Outcome:
    return asyncio.run(scenario())


def test_all_become_ready_and_stop_in_the_order_of_their_ranks(stage) -> None:
    s = stage({"router": "ready wait", "scheduler": "ready wait", "worker-0": "load ready wait"})

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(AllReady))
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    assert [line for line in s.log() if "stop" in line] == ["router stop", "scheduler stop", "worker-0 stop"]
    assert s.saw(Loading)
    assert s.saw(Ready, 3)
    assert not any(psutil.pid_exists(pid) for pid in s.pids())


def test_a_child_that_hangs_is_killed_and_started_again(stage) -> None:
    s = stage({"worker-0": "ready alive wait; ready wait"}, policy=replace(POLICY, silent_s=0.6))

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(Ready, 2))
        await asyncio.sleep(1.0)  # the second run never says that it lives, and is not expected to
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    assert [notice.how for notice in s.notices if isinstance(notice, Died)] == ["hung for 0.6 s and was killed"]


@pytest.mark.timeout(20)
def test_a_supervisor_that_reads_nothing_keeps_no_service_waiting() -> None:
    read_fd, write_fd = os.pipe()
    try:
        on_event = write_events(write_fd)
        for _ in range(10_000):  # more than a pipe holds
            on_event("alive", {})
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_a_child_that_says_that_it_lives_is_left_alone(stage) -> None:
    s = stage({"worker-0": "ready " + "alive sleep:0.1 " * 20 + "wait"}, policy=replace(POLICY, silent_s=1.5))

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(Ready))
        await asyncio.sleep(2.0)
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    assert not s.saw(Died)


def test_a_child_that_dies_is_reported_and_started_again(stage) -> None:
    s = stage({"worker-0": "ready crash; ready wait"})

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(Ready, 2))
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    died = next(notice for notice in s.notices if isinstance(notice, Died))
    assert died.name == "worker-0"
    assert "SIGKILL" in died.how
    assert [n.restarted for n in s.notices if isinstance(n, Ready)] == [False, True]


def test_a_refusal_stops_the_others_and_is_the_message(stage) -> None:
    s = stage({"router": "ready wait", "worker-0": "sleep:0.2 refuse:no_such_model exit:2"})
    assert run(s.supervisor.run) == Outcome(1, "worker-0: no such model")
    assert not any(psutil.pid_exists(pid) for pid in s.pids())


def test_a_child_that_fails_before_it_is_ready_leaves_its_last_lines(stage) -> None:
    s = stage({"worker-0": "print:Traceback-of-it exit:1"})
    outcome = run(s.supervisor.run)
    assert outcome.exit_code == 1
    assert outcome.tail == ("Traceback-of-it",)
    assert s.notices == [Line("worker-0", "Traceback-of-it")]


def test_starts_that_keep_failing_end_with_a_message(stage) -> None:
    s = stage({"worker-0": "ready crash; crash; crash; crash"})
    outcome = run(s.supervisor.run)
    assert outcome.exit_code == 1
    assert "3 starts in a row failed" in outcome.message
    assert len(s.pids()) == 4


def test_a_drained_router_stops_the_rest(stage) -> None:
    s = stage({"router": "ready sleep:0.3 exit:0", "worker-0": "ready wait"}, ends_cluster=True)
    assert run(s.supervisor.run) == Outcome(0)
    assert "worker-0 stop" in s.log()


def test_a_child_that_ignores_the_stop_is_killed_in_time(stage) -> None:
    s = stage({"worker-0": "stubborn ready wait"}, stop_timeout_s=0.3)

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(AllReady))
        s.supervisor.request_stop()
        return await asyncio.wait_for(running, 3)

    assert run(scenario) == Outcome(0)
    assert not any(psutil.pid_exists(pid) for pid in s.pids())


def test_a_second_stop_kills_at_once(stage) -> None:
    s = stage({"router": "stubborn ready wait", "worker-0": "stubborn ready wait"}, stop_timeout_s=60.0)

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(AllReady))
        s.supervisor.request_stop()
        await asyncio.sleep(0.1)
        s.supervisor.request_stop()
        return await asyncio.wait_for(running, 3)

    assert run(scenario) == Outcome(0)


def test_a_stop_during_the_backoff_does_not_wait_for_it(stage) -> None:
    s = stage({"worker-0": "ready crash; wait"})
    s.supervisor._policy = RestartPolicy(first_delay_s=30.0)

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(Died))
        s.supervisor.request_stop()
        return await asyncio.wait_for(running, 3)

    assert run(scenario) == Outcome(0)


def test_very_long_lines_of_a_child_neither_block_nor_break_it(stage, tmp_path: Path) -> None:
    s = stage({"worker-0": f"print:{'x' * 100_000} ready wait"})

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(AllReady))
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    assert sum(len(n.text) for n in s.notices if isinstance(n, Line)) == 100_000


def test_an_observer_that_cannot_write_does_not_stop_the_pumps(stage) -> None:
    s = stage({"worker-0": "fill:600 ready wait"})

    def observe(notice: Notice) -> None:
        s.notices.append(notice)
        raise BrokenPipeError

    s.supervisor._observe = observe

    async def scenario() -> Outcome:
        running = asyncio.create_task(s.supervisor.run())
        await s.until(lambda: s.saw(AllReady))
        s.supervisor.request_stop()
        return await running

    assert run(scenario) == Outcome(0)
    assert s.saw(Line, 600)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    program = f"""
        import asyncio, sys
        from services.cli.supervise import ServiceSpec, Supervisor
        argv = (sys.executable, {FAKE!r}, "--play=stubborn ready wait", "--runs={runs}", "--name=w")
        asyncio.run(Supervisor([ServiceSpec(name="w", argv=argv)], lambda notice: print(notice, flush=True)).run())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        assert "Ready" in parent.stdout.readline()
        child = int(runs.read_text().split()[2])
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 5
        while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the child outlived its supervisor"
            time.sleep(0.02)
