"""What the scheduler exports: the core's counts and queues as they stand, and the pace of each worker's steps."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.scheduler.core.phases import WaitReason
from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.worker_group import WorkerGroup
from shared.clock import NS_PER_S, NowNs
from shared.telemetry import metrics
from shared.telemetry.exposition import Exposition, Histogram, Reading


@dataclass(slots=True)
class _Pace:
    """One worker's steps in flight, and when its last result came (0: it was idle since)."""

    sent_ns: deque[int] = field(default_factory=deque)
    answered_ns: int = 0


class StepMeter:
    """Observes every step as the loop sends it and as its result comes back: about half a microsecond each."""

    def __init__(self) -> None:
        self.tokens = Histogram(metrics.ITERATION_TOKENS)
        self.run = Histogram(metrics.STEP_TIME)
        self.gap = Histogram(metrics.STEP_GAP)
        self.abort_to_free = Histogram(metrics.ABORT_TO_FREE)
        self._paces: dict[str, _Pace] = {}

    def on_sent(self, group: str, plan: StepPlan, now_ns: int) -> None:
        self.tokens.observe(plan.num_tokens)
        pace = self._paces.get(group)
        if pace is None:
            pace = self._paces[group] = _Pace()
        pace.sent_ns.append(now_ns)

    def on_result(self, group: str, result: StepResult, busy: bool, now_ns: int) -> None:
        """`busy`: the worker still has work, so that what passes until its next result is no idleness."""
        pace = self._paces.get(group)
        if pace is None or not pace.sent_ns:
            return
        sent_ns = pace.sent_ns.popleft()
        if result.error:
            self._paces.pop(group)  # it skips what follows, and begins again
            return
        self.run.observe(result.run_ns / NS_PER_S)
        period_ns = now_ns - (pace.answered_ns or sent_ns)
        self.gap.observe(max(0, period_ns - result.run_ns) / NS_PER_S)
        pace.answered_ns = now_ns if busy else 0

    def on_lost(self, group: str) -> None:
        self._paces.pop(group, None)


class SchedulerMetrics:
    """Reads the core from the thread of a scrape: numbers and whole copies, never an iteration over what may change."""

    def __init__(
        self,
        core: Scheduler,
        steps: StepMeter,
        *,
        lag: Histogram,
        num_violations: Callable[[], int],
        heard_ns: Callable[[], Mapping[str, int]],
        now_ns: NowNs,
    ) -> None:
        """`heard_ns` says when each registered worker was last heard of."""
        self._core = core
        self._heard_ns = heard_ns
        self._now_ns = now_ns
        counts = core.counts
        self.exposition = Exposition(
            metrics.EXPORTED["scheduler"],
            {
                metrics.NUM_RUNNING.name: lambda: self._sum(lambda group: len(group.running)),
                metrics.NUM_WAITING.name: lambda: self._sum(lambda group: group.num_waiting),
                metrics.NUM_WAITING_BY_REASON.name: self._waiting_by_reason,
                metrics.KV_CACHE_USAGE.name: self._usage,
                metrics.KV_BLOCKS.name: self._blocks,
                metrics.PREFIX_CACHE_QUERIES.name: lambda: counts.prefix_queries,
                metrics.PREFIX_CACHE_HITS.name: lambda: counts.prefix_hits,
                metrics.NUM_PREEMPTIONS.name: lambda: {key.value: n for key, n in counts.preemptions.items()},
                metrics.ITERATION_TOKENS.name: lambda: steps.tokens,
                metrics.STEP_TIME.name: lambda: steps.run,
                metrics.STEP_GAP.name: lambda: steps.gap,
                metrics.LOOP_LAG.name: lambda: lag,
                metrics.ABORT_TO_FREE.name: lambda: steps.abort_to_free,
                metrics.ABORTS.name: lambda: {phase.name.lower(): n for phase, n in counts.aborts.items()},
                metrics.MIGRATIONS.name: lambda: {key.value: n for key, n in counts.migrations.items()},
                metrics.KV_INVARIANT_VIOLATIONS.name: num_violations,
                metrics.HEARTBEAT_AGE.name: self._heartbeat_ages,
            },
        )

    def _groups(self) -> list[WorkerGroup]:
        return list(self._core.groups.values())

    def _sum(self, of: Callable[[WorkerGroup], int]) -> int:
        return sum(map(of, self._groups()))

    def _waiting_by_reason(self) -> Reading:
        waiting = {reason.value: 0 for reason in WaitReason}
        for group in self._groups():
            for reason, number in group.waiting_by_reason().items():
                waiting[reason.value] += number
        return waiting

    def _blocks(self) -> dict[str, int]:
        """The three sum to all blocks, whatever the loop does meanwhile."""
        states = {"free": 0, "cached": 0, "referenced": 0}
        for group in self._groups():
            free, cached = len(group.pool.free), len(group.pool.cached)
            states["free"] += free
            states["cached"] += cached
            states["referenced"] += group.pool.num_blocks - free - cached
        return states

    def _usage(self) -> float:
        states = self._blocks()
        return states["referenced"] / (sum(states.values()) or 1)

    def _heartbeat_ages(self) -> Reading:
        now_ns = self._now_ns()
        return {worker: max(0, now_ns - heard_ns) / NS_PER_S for worker, heard_ns in self._heard_ns().items()}
