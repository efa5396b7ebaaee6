"""Drives the core against pretend devices, checks every invariant after every step, and every answer at its end."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from services.scheduler.core.events import PlainTokens, Released, SampleEnded, Tokens
from services.scheduler.core.grammars import Prepare
from services.scheduler.core.invariants import violations
from services.scheduler.core.phases import MOST_SEGMENTS
from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from shared.outcome import AbortCause, FinishReason
from shared.sampling import Sampling, Stopping
from tests.builders.pretend_device import PretendDevice, generate

VOCAB = 50
_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


def submission(key: object, tokens: Iterable[int], **changes: object) -> Submission:
    """A submission by keywords: those of Submission, and max_tokens, min_tokens, stop, seed."""
    stopping = Stopping(
        max_tokens=changes.pop("max_tokens", 8),
        min_tokens=changes.pop("min_tokens", 0),
        stop_token_ids=frozenset(changes.pop("stop", ())),
    )
    sampling = Sampling(seed=changes.pop("seed", 7))
    return Submission(key=key, token_ids=tuple(tokens), sampling=sampling, stopping=stopping, **changes)


@dataclass
class CoreDriver:
    """`max_in_flight` plans per group; time is a counter that tests advance."""

    config: CoreConfig = field(default_factory=lambda: CoreConfig(max_model_len=256))
    max_in_flight: int = 2
    check: bool = True
    now_ns: int = 0
    steps: int = 0
    plans: list[StepPlan] = field(default_factory=list)
    submissions: dict[object, Submission] = field(default_factory=dict)
    cut_short: set[object] = field(default_factory=set)
    max_lens: dict[object, int] = field(default_factory=dict)
    tokens: dict[tuple[object, int], list[int]] = field(default_factory=dict)
    ends: dict[tuple[object, int], SampleEnded] = field(default_factory=dict)
    prompt_logprobs: dict[object, tuple] = field(default_factory=dict)
    released: dict[object, Released] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.core = Scheduler(self.config)
        self.devices: dict[str, PretendDevice] = {}
        self.flying: dict[str, deque[StepPlan]] = {}
        self.asked: dict[str, deque[Prepare]] = {}
        """Grammars that the device has not answered for."""

    def add_group(self, name: str = "g0", *, num_blocks: int = 64, block_size: int = 4, **spec: object) -> None:
        spec = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, **spec}
        self.core.add_group(GroupSpec(id=name, num_blocks=num_blocks, block_size=block_size, **spec), self.now_ns)
        self.devices[name] = PretendDevice(num_blocks, block_size, VOCAB, windows=spec.get("windows", (None,)))
        self.flying[name] = deque()
        self.asked[name] = deque()

    def lose_group(self, name: str) -> None:
        self.core.lose_group(name, self.now_ns)
        del self.devices[name], self.flying[name], self.asked[name]
        self._absorb()

    def submit(self, one: Submission) -> None:
        self.submissions[one.key] = one
        self.core.submit(one, self.now_ns)
        if one.key in self.core.requests:
            self.max_lens[one.key] = self.core.requests[one.key].max_len
        self._absorb()

    def abort(self, key: object, index: int = -1, cause: AbortCause = AbortCause.CLIENT) -> None:
        self.cut_short.add(key)
        self.core.abort(key, index, cause, self.now_ns)
        self._absorb()

    def prepare(self, name: str = "g0", *, error: str = "") -> None:
        """The device's answer for the grammar that it was asked for first, if any."""
        self._hear(name)
        if self.asked.get(name):
            grammar = self.asked[name].popleft()
            if not error:
                self.devices[name].grammars[grammar.id] = grammar.structured
            self.core.prepared(name, grammar.id, error, self.now_ns)
            self._absorb()

    def _hear(self, name: str) -> None:
        for command in self.core.groups[name].grammars.drain() if name in self.devices else ():
            if isinstance(command, Prepare):
                self.asked[name].append(command)
            elif self.devices[name].grammars.pop(command.id, None) is None:
                self.asked[name] = deque(each for each in self.asked[name] if each.id != command.id)

    def schedule(self, name: str = "g0") -> StepPlan | None:
        """One plan, where another may fly."""
        self._hear(name)
        if name not in self.flying or len(self.flying[name]) >= self.max_in_flight:
            return None
        plan = self.core.schedule(name, self.now_ns)
        if plan:
            self.steps += 1
            assert plan.num_tokens <= self.config.max_num_batched_tokens, "a step keeps to its budget"
            self.plans.append(plan)
            self._check_windows(name)
            self.devices[name].arrive(plan)
            self.flying[name].append(plan)
        self._absorb()
        return plan

    def deliver(self, name: str = "g0", *, error: str = "") -> StepResult | None:
        """The device's answer to the oldest plan, or its failure: then it skips every plan in flight."""
        if not self.flying.get(name):
            return None
        plan = self.flying[name].popleft()
        if error:
            self.flying[name].clear()
            self._hear(name)
            self.asked[name].clear()
            self.devices[name].reset()
            result = StepResult(step=plan.step, error=error)
        else:
            result = self.devices[name].run(plan)
        self.core.apply(name, result, self.now_ns)
        self._absorb()
        return result

    def run(self, limit: int = 100_000) -> None:
        """Until every request is released."""
        for _ in range(limit):
            if not self.core.requests:
                return
            self.now_ns += 1_000_000
            for name in list(self.devices):
                self.prepare(name)
                while self.schedule(name):
                    pass
                self.deliver(name)
        raise AssertionError(f"{len(self.core.requests)} requests are left after {limit} rounds")

    def answer(self, key: object, index: int = 0) -> list[int]:
        return self.tokens.get((key, index), [])

    def expected(self, key: object, index: int = 0) -> list[int]:
        """What the sample answers when nothing disturbs it."""
        one = self.submissions[key]
        longest = self.max_lens[key] - len(one.token_ids)
        stopping = one.stopping
        return generate(
            list(one.token_ids), one.sampling.seed, index, VOCAB, longest, stopping.stop_token_ids, stopping.min_tokens
        )

    def assert_answers(self) -> None:
        """Every sample ended once; what it says is what it would say alone, in whole or (ended early) in part."""
        for key, one in self.submissions.items():
            if key not in self.released:
                continue
            release = self.released[key]
            if release.refusal and (key, 0) not in self.ends:
                continue
            if one.want.prompt_logprobs >= 0 and release.refusal is None and key not in self.cut_short:
                told = [entry.rank for entry in self.prompt_logprobs[key]]
                assert told == list(one.token_ids[1:]), (key, told)
            for index in range(one.n):
                answer, expected = self.answer(key, index), self.expected(key, index)
                end = self.ends[key, index]
                if end.reason in _WHOLE and release.refusal is None and key not in self.cut_short:
                    assert answer == expected, (key, index, answer, expected)
                else:
                    assert answer == expected[: len(answer)], (key, index, answer, expected)

    def assert_idle(self) -> None:
        """Nothing is held once nobody is left."""
        assert not self.core.requests
        for group in self.core.groups.values():
            load = group.load()
            assert len(group.grammars) == 0
            assert load.kv_blocks_referenced == 0 == load.requests_running == load.requests_waiting
            assert load.kv_blocks_free + load.kv_blocks_cached == load.kv_blocks_total

    def _check_windows(self, name: str) -> None:
        """Each row of the newest plan holds the blocks that it or a later step reads, and none before them."""
        group = self.core.groups[name]
        flight = group.in_flight[-1]
        for sample, count in zip(flight.rows, flight.plan.counts, strict=True):
            for window, table in zip(group.spec.windows, sample.tables, strict=True):
                oldest = 0 if window is None else max(0, sample.planned - count - window + 1)
                assert table.first == oldest // group.spec.block_size, (sample.request.key, window, oldest, table)

    def _absorb(self) -> None:
        for event in self.core.take_events():
            match event:
                case PlainTokens(names, token_ids):
                    assert not self.ends.keys() & set(names), "no token after the end"
                    for name, token_id in zip(names, token_ids, strict=True):
                        self.tokens.setdefault(name, []).append(token_id)
                case Tokens(key, index, token_ids):
                    assert (key, index) not in self.ends, "no token after the end"
                    if event.prompt_logprobs:
                        assert key not in self.prompt_logprobs, "prompt logprobs are sent once"
                        self.prompt_logprobs[key] = event.prompt_logprobs
                    self.tokens.setdefault((key, index), []).extend(token_ids)
                case SampleEnded(key, index):
                    assert (key, index) not in self.ends, "one end per sample"
                    self.ends[key, index] = event
                case Released():
                    assert event.key not in self.released, "released once"
                    durations = event.durations
                    parts = durations.queue_ns + durations.prefill_ns + durations.decode_ns
                    assert parts == durations.total_ns
                    assert sum(durations.queue_reason_ns.values()) == durations.queue_ns
                    _check_segments(event)
                    self.released[event.key] = event
        if self.check:
            assert violations(self.core) == []


def _check_segments(released: Released) -> None:
    """They tell the same story in order: each phase's stretches sum to it, and so do the reasons to wait and the
    tokens."""
    durations = released.durations
    for phase in ("queue", "prefill", "decode"):
        stretches = [segment.ns for segment in durations.segments if segment.phase == phase]
        assert sum(stretches) == getattr(durations, f"{phase}_ns")
    for segment in durations.segments:
        assert sum(segment.reason_ns.values()) == (segment.ns if segment.phase == "queue" else 0)
    neighbours = itertools.pairwise(segment.phase for segment in durations.segments)
    assert all(before != after for before, after in neighbours)
    assert len(durations.segments) <= MOST_SEGMENTS + 2
    assert sum(segment.sampled_tokens for segment in durations.segments) == released.completion_tokens
    assert sum(segment.preemptions for segment in durations.segments) == durations.preemptions


def replay(plans: Sequence[StepPlan]) -> list[object]:
    """Plans as plain JSON data, for golden files."""
    return [
        {
            "step": plan.step,
            "slots": list(plan.slots),
            "counts": list(plan.counts),
            "block_counts": list(plan.block_counts),
            "samples": list(plan.samples),
            "blocks": list(plan.blocks),
            "admissions": [
                {
                    **{
                        name: value
                        for name, value in msgspec.to_builtins(a).items()
                        if name not in ("trace", "tables", "grammar")
                    },
                    "blocks": [block for _, blocks in a.tables for block in blocks],
                    "token_ids": len(a.token_ids) // 4,
                    "stop_token_ids": sorted(a.stop_token_ids),
                }
                for a in plan.admissions
            ],
        }
        for plan in plans
    ]
