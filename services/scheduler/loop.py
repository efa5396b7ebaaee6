"""plan → send → await → absorb → publish. Only this loop touches the core, so the core needs no locks.

It has no task of its own: commands, results and timers call in, and one turn per batch of them plans as far as the
plans in flight allow.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import structlog

from services.scheduler.core.events import Event, Released
from services.scheduler.core.invariants import violations
from services.scheduler.core.plan import StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.worker_group import GroupLoad, GroupSpec
from services.scheduler.metrics import StepMeter
from services.scheduler.publish import Publisher, RouterLink
from services.scheduler.workers import Workers
from shared.clock import NS_PER_S, NowNs
from shared.outcome import AbortCause, Refusal
from shared.prefix import short

log = structlog.get_logger("loop")
P = ParamSpec("P")

IDLE_CHECK_S = 1.0
"""The books are checked once nothing has run for so long: 50,000 blocks take 25 ms, which no request is to wait for."""


def guarded(method: Callable[Concatenate["Loop", P], None]) -> Callable[Concatenate["Loop", P], None]:
    """What touches the core and raises leaves it in doubt, whoever called."""

    @functools.wraps(method)
    def call(self: "Loop", *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.fatal(error)

    return call


class Loop:
    """Owns the core. `fatal` is called with an exception that leaves the core in doubt: the process must end."""

    def __init__(
        self,
        core: Scheduler,
        workers: Workers,
        publisher: Publisher,
        *,
        max_plans_in_flight: int,
        now_ns: NowNs,
        fatal: Callable[[BaseException], None],
        check_every_step: bool = False,
        meter: StepMeter | None = None,
    ) -> None:
        self._core = core
        self._workers = workers
        self._publisher = publisher
        self._max_plans_in_flight = max_plans_in_flight
        self._now_ns = now_ns
        self.fatal = fatal
        self._check_every_step = check_every_step
        self._meter = meter or StepMeter()
        self._turn_due = False
        self._deadline: asyncio.TimerHandle | None = None
        self._idle_check: asyncio.TimerHandle | None = None
        self.draining = False
        self.num_violations = 0
        self.idle = asyncio.Event()
        self.idle.set()

    # Commands.

    @guarded
    def submit(self, submission: Submission) -> None:
        if self.draining:
            refusal = Refusal(name="draining", message="the scheduler is shutting down", retry_after_ms=1000)
            self._publish([Released(key=submission.key, refusal=refusal)])
            return
        self.idle.clear()
        self._core.submit(submission, self._now_ns())
        self.request_turn()

    @guarded
    def abort(self, link: int, key: int, index: int, cause: AbortCause) -> None:
        self._core.abort((link, key), index, cause, self._now_ns())
        self.request_turn()

    @guarded
    def abort_link(self, link: RouterLink) -> None:
        """The router is gone, and nobody waits for its answers."""
        self._publisher.close(link)
        for key in [key for key in self._core.requests if key[0] == link.number]:  # type: ignore[index]
            self._core.abort(key, -1, AbortCause.CLIENT, self._now_ns())
        self.request_turn()

    @guarded
    def abort_all(self, cause: AbortCause) -> None:
        for key in list(self._core.requests):
            self._core.abort(key, -1, cause, self._now_ns())
        self.request_turn()

    # From the workers.

    @guarded
    def on_ready(self, spec: GroupSpec) -> None:
        self._core.add_group(spec, self._now_ns())
        self._publisher.publish_state()
        self.request_turn()

    @guarded
    def on_result(self, group: str, result: StepResult) -> None:
        if group not in self._core.groups:
            return
        now_ns = self._now_ns()
        self._core.apply(group, result, now_ns)
        self._meter.on_result(group, result, self._core.groups[group].has_work, now_ns)
        if result.error:
            self._workers.begin_again(group)
        self.request_turn()

    @guarded
    def on_prepared(self, group: str, grammar_id: int, error: str) -> None:
        if group in self._core.groups:
            self._core.prepared(group, grammar_id, error, self._now_ns())
            self.request_turn()

    @guarded
    def on_lost(self, group: str, reason: str) -> None:
        if group not in self._core.groups:
            return
        self._publish_blocks()
        warm = [short(block_hash) for block_hash in self._core.groups[group].pool.index.by_hash[0]]
        self._publisher.publish_blocks([], warm)
        self._core.lose_group(group, self._now_ns())
        self._meter.on_lost(group)
        self._publisher.publish_state()
        self.request_turn()

    # Views.

    @property
    def ready(self) -> bool:
        return bool(self._core.groups) and not self.draining

    @property
    def num_requests(self) -> int:
        return len(self._core.requests)

    def loads(self) -> list[GroupLoad]:
        return [group.load() for group in self._core.groups.values()]

    # The turn.

    def request_turn(self) -> None:
        """A turn once what is ready now has run."""
        if not self._turn_due:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    @guarded
    def _turn(self) -> None:
        self._turn_due = False
        self._plan()
        self._publish(self._core.take_events())
        for freed_ns in self._core.counts.drain_freed_ns():
            self._meter.abort_to_free.observe(freed_ns / NS_PER_S)
        self._note_idleness()
        self._arm_deadline()

    def _plan(self) -> None:
        for group in list(self._core.groups.values()):
            for command in group.grammars.drain():
                self._workers.tell(group.id, command)
            while len(group.in_flight) < self._max_plans_in_flight:
                now_ns = self._now_ns()
                plan = self._core.schedule(group.id, now_ns)
                if plan is None:
                    break
                self._workers.send(group.id, plan)
                self._meter.on_sent(group.id, plan, now_ns)

    def _publish(self, events: list[Event]) -> None:
        self._publish_blocks()
        self._publisher.publish(events)

    def _publish_blocks(self) -> None:
        for group in self._core.groups.values():
            stored, removed = group.pool.index.drain_changes()
            if stored or removed:
                self._publisher.publish_blocks(stored, removed)

    def _note_idleness(self) -> None:
        """Integrity after every step where configured, else once the scheduler has been idle for a while."""
        if self._check_every_step:
            self._check()
        falls_idle = not self._core.requests and not self.idle.is_set()
        if self._idle_check is not None and (self._core.requests or falls_idle):
            self._idle_check.cancel()
            self._idle_check = None
        if self._core.requests:
            self.idle.clear()
        elif falls_idle:
            self.idle.set()
            self._idle_check = asyncio.get_running_loop().call_later(IDLE_CHECK_S, self._check)

    @guarded
    def _check(self) -> None:
        found = violations(self._core)
        for text in found:
            self.num_violations += 1
            log.error("invariant_violated", what=text)
        if found:
            self._start_groups_afresh()

    def _start_groups_afresh(self) -> None:
        """The books are in doubt: the workers are let go of, and come back with empty pools. What still runs is
        planned again, or ends with a retryable error."""
        for group in list(self._core.groups):
            self._workers.give_up(group, "an invariant was violated")

    def _arm_deadline(self) -> None:
        """A deadline passes even while no step runs."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        next_ns = self._core.next_deadline_ns()
        if next_ns is not None:
            delay_s = max(0.0, (next_ns - self._now_ns()) / 1e9)
            self._deadline = asyncio.get_running_loop().call_later(delay_s, self._expire)

    @guarded
    def _expire(self) -> None:
        self._deadline = None
        self._core.expire(self._now_ns())
        self.request_turn()
