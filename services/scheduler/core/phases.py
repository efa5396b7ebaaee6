"""Where a request's time goes: queue (and why), prefill, decode. Durations only, added up as they pass."""

import enum
from dataclasses import dataclass, field

from services.scheduler.core.events import Durations, Segment

MOST_SEGMENTS = 32
"""A request that is preempted again and again adds to its last segments: the account of it stays small."""


@enum.unique
class Phase(enum.IntEnum):
    """A request is in the most advanced phase of its samples."""

    QUEUE = 0
    PREFILL = 1
    DECODE = 2


@enum.unique
class WaitReason(enum.Enum):
    """Why a request waits. The first four are the queue's, for everybody in it; the others a request's own. `step` is
    the least: nothing but the steps in flight was in the way. `grammar`: its worker compiles what it must look like."""

    STEP = "step"
    BUDGET = "budget"
    BLOCKS = "blocks"
    MAX_NUM_SEQS = "max_num_seqs"
    PRIORITY = "priority"
    GRAMMAR = "grammar"
    WORKER_LOST = "worker_lost"


@dataclass(slots=True)
class WaitClock:
    """What passed in one worker group, for everybody in it: the time under each reason to wait, and the steps that the
    group finished. A request takes a reading when it enters a phase and another when it leaves, so that a step costs
    nothing per request."""

    reason: WaitReason = WaitReason.STEP
    since_ns: int = 0
    passed_ns: dict[WaitReason, int] = field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    device_ns: int = 0

    def count_step(self, rows: int, device_ns: int) -> None:
        self.steps += 1
        self.rows += rows
        self.device_ns += device_ns

    @property
    def work(self) -> tuple[int, int, int]:
        """Steps, their rows and their device time until now."""
        return self.steps, self.rows, self.device_ns

    def turn(self, reason: WaitReason, now_ns: int) -> None:
        """From now on the queue waits for `reason`."""
        self.passed_ns[self.reason] = self.passed_ns.get(self.reason, 0) + now_ns - self.since_ns
        self.since_ns = now_ns
        self.reason = reason

    def read(self, now_ns: int) -> dict[WaitReason, int]:
        self.turn(self.reason, now_ns)
        return dict(self.passed_ns)


@dataclass(slots=True)
class _Stretch:
    """A segment in the making."""

    phase: Phase
    ns: int = 0
    work: list[int] = field(default_factory=lambda: [0, 0, 0])
    own: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0])
    reason_ns: dict[str, int] = field(default_factory=dict)

    def seal(self) -> Segment:
        steps, rows, device_ns = self.work
        chunks, computed, cached, sampled, preemptions = self.own
        return Segment(
            phase=self.phase.name.lower(),
            ns=self.ns,
            steps=steps,
            rows=rows,
            device_ns=device_ns,
            chunks=chunks,
            computed_tokens=computed,
            cached_tokens=cached,
            sampled_tokens=sampled,
            preemptions=preemptions,
            reason_ns=dict(self.reason_ns),
        )


@dataclass(slots=True)
class Ledger:
    """One request's time, and its own work meanwhile. `in_phase[p]` counts its live samples in phase p."""

    since_ns: int
    num_samples: int
    clock: WaitClock
    """Of the group that it is in, or was in last."""
    started_ns: int = field(init=False)
    in_phase: list[int] = field(init=False)
    stretches: list[_Stretch] = field(default_factory=list)
    phase: Phase = Phase.QUEUE
    reading: dict[WaitReason, int] = field(init=False)
    work_before: tuple[int, int, int] = field(init=False)
    own_before: tuple[int, ...] = (0, 0, 0, 0, 0)
    own_reason: WaitReason | None = None
    """Why the request waits from now on, whatever the queue says: a lost worker, its grammar, or one that overtook
    it."""
    preemptions: int = 0
    chunks: int = 0
    """Rows of steps that computed for it, and their tokens; those found in the cache; those it sampled."""
    computed_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0

    def __post_init__(self) -> None:
        self.started_ns = self.since_ns
        self.in_phase = [self.num_samples, 0, 0]
        self._enter(self.clock, self.since_ns)

    def move(self, before: Phase, after: Phase | None, clock: WaitClock, now_ns: int) -> None:
        """One sample goes from a phase to another, or ends (None); `clock` is that of the queue it would wait in."""
        self.in_phase[before] -= 1
        if after is not None:
            self.in_phase[after] += 1
        phase = self._most_advanced()
        if phase is self.phase:
            return
        self._settle(now_ns)
        self.phase = phase
        self._enter(clock, now_ns)

    def change_queue(self, clock: WaitClock, now_ns: int, own_reason: WaitReason | None = None) -> None:
        """The request waits elsewhere from now on, or for something else. Nothing to do while one of its samples
        runs."""
        if self.phase is Phase.QUEUE:
            self._settle(now_ns)
            self._enter(clock, now_ns)
            self.own_reason = own_reason

    def overtake(self, overtaken: bool, now_ns: int) -> None:
        """Whether, from now on, one that came later stands before it in its queue. A lost worker outweighs that."""
        reason = WaitReason.PRIORITY if overtaken else None
        if self.phase is not Phase.QUEUE or self.own_reason in (reason, WaitReason.WORKER_LOST):
            return
        self._settle(now_ns)
        self._enter(self.clock, now_ns)
        self.own_reason = reason

    def close(self, now_ns: int) -> Durations:
        """The final account."""
        self._settle(now_ns)
        spent_ns, reason_ns = [0, 0, 0], dict[str, int]()
        for stretch in self.stretches:
            spent_ns[stretch.phase] += stretch.ns
            for reason, waited_ns in stretch.reason_ns.items():
                reason_ns[reason] = reason_ns.get(reason, 0) + waited_ns
        queue, prefill, decode = spent_ns
        return Durations(
            total_ns=now_ns - self.started_ns,
            queue_ns=queue,
            prefill_ns=prefill,
            decode_ns=decode,
            preemptions=self.preemptions,
            queue_reason_ns=reason_ns,
            segments=tuple(stretch.seal() for stretch in self.stretches),
        )

    def _most_advanced(self) -> Phase:
        if self.in_phase[Phase.DECODE]:
            return Phase.DECODE
        return Phase.PREFILL if self.in_phase[Phase.PREFILL] else Phase.QUEUE

    def _enter(self, clock: WaitClock, now_ns: int) -> None:
        self.clock = clock
        self.work_before = clock.work
        if self.phase is Phase.QUEUE:
            self.reading = clock.read(now_ns)

    def _settle(self, now_ns: int) -> None:
        """Adds what passed since the last time to the stretch of this phase."""
        passed_ns, stretch = now_ns - self.since_ns, self._stretch()
        stretch.ns += passed_ns
        self.since_ns = now_ns
        done = self.clock.work
        stretch.work = [had + now - then for had, now, then in zip(stretch.work, done, self.work_before, strict=True)]
        self.work_before = done
        own = (self.chunks, self.computed_tokens, self.cached_tokens, self.sampled_tokens, self.preemptions)
        stretch.own = [had + now - then for had, now, then in zip(stretch.own, own, self.own_before, strict=True)]
        self.own_before = own
        if self.phase is not Phase.QUEUE:
            return
        if self.own_reason is not None:
            _add_wait(stretch, self.own_reason, passed_ns)
            self.own_reason = None
            return
        for reason, total_ns in self.clock.read(now_ns).items():
            _add_wait(stretch, reason, total_ns - self.reading.get(reason, 0))

    def _stretch(self) -> _Stretch:
        """The current one: a new one after another phase, unless there are too many."""
        if self.stretches and self.stretches[-1].phase is self.phase:
            return self.stretches[-1]
        if len(self.stretches) >= MOST_SEGMENTS:
            alike = [stretch for stretch in self.stretches if stretch.phase is self.phase]
            if alike:
                return alike[-1]
        self.stretches.append(_Stretch(self.phase))
        return self.stretches[-1]


def _add_wait(stretch: _Stretch, reason: WaitReason, waited_ns: int) -> None:
    if waited_ns:
        stretch.reason_ns[reason.value] = stretch.reason_ns.get(reason.value, 0) + waited_ns
