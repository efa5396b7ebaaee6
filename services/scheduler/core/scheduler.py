"""The scheduler: submit, abort, schedule, apply. One rule: a step moves `computed` towards `known` within a budget.

Nothing here waits, reads a clock or draws a number; time is an argument, in nanoseconds of one monotonic clock. What
happened to requests comes out of `take_events`.
"""

import heapq
from collections.abc import Sequence
from itertools import compress
from typing import Any

import msgspec

from services.scheduler.core.admission import Limits, longest_sample, refuse_submission
from services.scheduler.core.counts import Counts, Migration, PreemptReason
from services.scheduler.core.events import Event, PlainTokens, Released, RequestKey, SampleEnded, Tokens
from services.scheduler.core.groups import BlockTable
from services.scheduler.core.phases import Ledger, Phase, WaitReason
from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.policy import POLICIES, Policy
from services.scheduler.core.request import Request, Sample, Status, Submission, make_samples
from services.scheduler.core.step import Step
from services.scheduler.core.worker_group import GroupSpec, InFlight, WorkerGroup
from shared.outcome import AbortCause, FinishReason, Refusal
from shared.prefix import root_hash
from shared.sampling import TokenLogprobs
from shared.structured import Structured


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the core can be told. `long_prefill_token_threshold` 0 means the whole budget, `max_model_len` 0 what the
    workers can do."""

    max_model_len: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    max_num_queued_reqs: int = 2048
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    max_step_retries: int = 1
    """How often a request may be part of a failed step before it ends with an error."""


class Scheduler:
    """Decides everything about requests on its worker groups. Not thread-safe: one loop owns it."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.groups: dict[str, WorkerGroup] = {}
        self.requests: dict[RequestKey, Request] = {}
        self.counts = Counts()
        self._limits = Limits(max_num_queued_reqs=config.max_num_queued_reqs, max_model_len=config.max_model_len)
        self._policy: Policy = POLICIES[config.policy]()
        self._arrivals = 0
        self._deadlines: list[tuple[int, int, RequestKey]] = []
        self._events: list[Event] = []

    # What comes in.

    def add_group(self, spec: GroupSpec, now_ns: int) -> None:
        """A worker group is ready. Raises ValueError for an id in use.

        A step holds no more sequences than tokens: with a smaller budget than `max_num_seqs` fewer run at once.
        """
        if spec.id in self.groups:
            raise ValueError(f"group {spec.id} exists")
        budget = min(spec.max_num_batched_tokens, self.config.max_num_batched_tokens)
        max_num_seqs = min(spec.max_num_seqs, self.config.max_num_seqs, budget)
        capped = msgspec.structs.replace(spec, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        chunk = self._chunk(budget - 1) + 1  # a running sample's next token is its own beside it
        group = WorkerGroup(capped, chunk)
        group.clock.since_ns = now_ns
        self.groups[spec.id] = group

    def lose_group(self, group_id: str, now_ns: int) -> None:
        """A worker group is gone, its cache with it: its samples start again elsewhere, what was generated being known
        tokens; with nowhere to go they end with a retryable error."""
        group = self.groups.pop(group_id)
        for flight in group.in_flight:
            for sample in flight.rows:
                sample.known = len(sample.tokens)
            self._note_freed(flight, now_ns)
        for sample in [*group.running, *group.waiting, *group.preparing]:
            if sample.status is Status.RUNNING:
                self._count_preemption(sample, group, PreemptReason.WORKER_LOST, now_ns)
            sample.forget_progress()
            target = self._best_group(sample)
            self.counts.migrations[Migration.FAILED if target is None else Migration.MOVED] += 1
            if target is None:
                refusal = Refusal(
                    name="worker_lost", message="the worker was lost; try again soon", retry_after_ms=1000
                )
                self._end(sample, FinishReason.ERROR, group, now_ns, refusal=refusal)
            else:
                self._join(sample, target, now_ns)
                sample.request.ledger.change_queue(target.clock, now_ns, WaitReason.WORKER_LOST)

    def submit(self, submission: Submission, now_ns: int) -> None:
        """Takes a request, or refuses it by name through a Released event. Raises ValueError for a live key."""
        if submission.key in self.requests:
            raise ValueError(f"request {submission.key} is live")
        groups = list(self.groups.values())
        num_waiting = sum(group.num_waiting for group in groups)
        order = self._policy.order(arrival=self._arrivals + 1, priority=submission.priority, now_ns=now_ns)
        refusal = refuse_submission(submission, groups, num_waiting, self._limits, order, now_ns)
        if refusal:
            self._events.append(Released(key=submission.key, refusal=refusal))
            return
        self._arrivals += 1
        request, target = self._make_request(submission, groups, order, now_ns)
        self.requests[submission.key] = request
        for sample in request.samples:
            self._join(sample, target, now_ns)
        if submission.deadline_ns:
            self._watch_deadline(submission)

    def prepared(self, group_id: str, grammar_id: int, error: str, now_ns: int) -> None:
        """The worker has compiled a grammar, or says why it cannot: then those who need it end. An id that is not
        known any more is passed over."""
        group = self.groups[group_id]
        structured = group.grammars.settle(grammar_id)
        if structured is None:
            return
        for sample in [each for each in group.preparing if each.structured == structured]:
            group.preparing.remove(sample)
            group.waiting.add(sample)
            if sample.request.ledger.own_reason is WaitReason.GRAMMAR:
                sample.request.ledger.change_queue(group.clock, now_ns)
        if error:
            refusal = _wrong(structured, error)
            for sample in [each for each in group.waiting if each.structured == structured]:
                self._end_live(sample, FinishReason.ERROR, now_ns, refusal=refusal)

    def abort(self, key: RequestKey, index: int, cause: AbortCause, now_ns: int) -> None:
        """Ends one sample (or all, index -1), in whatever state. Idempotent: an unknown key is one already released."""
        request = self.requests.get(key)
        if request is None:
            return
        samples = request.samples if index < 0 else request.samples[index : index + 1]
        stop = cause is AbortCause.STOP_STRING
        reason = FinishReason.STOP if stop else FinishReason.ABORT
        refusal = None if stop else _ABORT_REFUSALS[cause]
        for sample in samples:
            if not stop:
                self._count_abort(sample, now_ns)
            self._end_live(sample, reason, now_ns, refusal=refusal)

    # What goes out.

    def schedule(self, group_id: str, now_ns: int) -> StepPlan | None:
        """The group's next step, or None where there is nothing to do. The plan is in flight from now on."""
        self.expire(now_ns)
        group = self.groups[group_id]
        step = Step(group.spec.max_num_batched_tokens - len(group.running))
        self._grant_running(group, step, now_ns)
        self._admit_waiting(group, step, now_ns)
        return step.seal(group) if step.rows else None

    def apply(self, group_id: str, result: StepResult, now_ns: int) -> None:
        """Absorbs the answer to the oldest plan in flight. Raises ValueError for any other step."""
        group = self.groups[group_id]
        if not group.in_flight or group.in_flight[0].plan.step != result.step:
            raise ValueError(f"step {result.step} is not the oldest plan in flight on {group_id}")
        if result.error:
            self._fail_step(group, now_ns)
            return
        flight = group.in_flight.popleft()
        self._note_freed(flight, now_ns)
        group.pace.learn(flight.plan.num_tokens, len(flight.rows), result.run_ns)
        group.clock.count_step(len(flight.rows), result.run_ns)
        place, told = len(self._events), bytearray(b"\1") * len(flight.rows)
        token_ids = _by_row(flight.plan, result)
        for row, (sample, token) in enumerate(zip(flight.rows, token_ids, strict=True)):
            tokens = sample.tokens
            num_tokens = len(tokens)
            if num_tokens < sample.plain_known and token not in sample.stop_token_ids:
                tokens.append(token)
                sample.computed = num_tokens
            else:
                told[row] = self._apply_closely(group, flight, row, sample, token, result, now_ns)
        names = [sample.name for sample in compress(flight.rows, told)]
        if names:  # before the ends of their samples
            self._events.insert(place, PlainTokens(names, list(compress(token_ids, told))))

    def expire(self, now_ns: int) -> None:
        """Ends the requests whose deadline has passed; `schedule` does so too."""
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            deadline_ns, _, key = heapq.heappop(self._deadlines)
            request = self.requests.get(key)
            if request and request.submission.deadline_ns == deadline_ns:
                self.abort(key, -1, AbortCause.DEADLINE, now_ns)

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def next_deadline_ns(self) -> int | None:
        return self._deadlines[0][0] if self._deadlines else None

    # Inside a step.

    def _grant_running(self, group: WorkerGroup, step: Step, now_ns: int) -> None:
        """Every running sample in the policy's order: blocks go to the first, and are taken from the last."""
        rows = step.rows
        for sample in group.running.samples:  # who is preempted meanwhile goes from its end
            end = sample.known
            if end < sample.plain_end:
                sample.planned = end
                sample.known = end + 1
                rows.append(sample)
                if sample.exact:
                    step.exact = True
            elif not self._grant_closely(group, sample, step, now_ns):
                break

    def _grant_closely(self, group: WorkerGroup, sample: Sample, step: Step, now_ns: int) -> bool:
        """What the sample's next step takes, if anything. False where it was preempted instead."""
        known = sample.known  # at max_len the last token is known or on its way
        count = known - sample.planned if known < sample.max_len else 0
        if count > 1:
            count = 1 + step.cut(self._chunk(count) - 1)  # one token was set aside for it
        if count <= 0:
            return True
        end, new_blocks = sample.planned + count, None
        if end > sample.provided:
            new_blocks = self._provide(group, sample, end, now_ns)
            if new_blocks is None:
                return False
        step.grant(sample, count, new_blocks or ())
        step.pending += group.index_full_blocks(sample, min(end, len(sample.tokens)))
        if sample.plain_end:
            sample.look_ahead(group.spec.block_size)
        return True

    def _chunk(self, remaining: int) -> int:
        """The most that one step takes of a prompt."""
        return min(remaining, self.config.long_prefill_token_threshold or remaining)

    def _provide(self, group: WorkerGroup, sample: Sample, end: int, now_ns: int) -> list[list[int]] | None:
        """Lets go of what the sample needs no more and takes the blocks, by cache group, for a step that ends at `end`.
        Preempts from the end of the order until they are available; None where that took `sample`."""
        group.drop_stale(sample)
        missing = group.missing(sample.tables, max(end, len(sample.tokens)))
        while group.pool.num_available < sum(missing):
            victim = group.running.samples[-1]
            self._preempt(victim, group, PreemptReason.BLOCKS, now_ns)
            if victim is sample:
                return None
        return group.provide(sample, missing)

    def _admit_waiting(self, group: WorkerGroup, step: Step, now_ns: int) -> None:
        """Takes samples from the queue, in order, until the first that does not fit; notes why it did not."""
        reason = WaitReason.STEP
        while (sample := group.waiting.first or self._steal(group, now_ns)) is not None:
            blocked = self._try_admit(group, sample, step, now_ns)
            if blocked is not None:
                reason = blocked
                break
        if reason is not group.clock.reason:
            group.clock.turn(reason, now_ns)
        for waiting, overtaken in group.waiting.overtaken():
            waiting.request.ledger.overtake(overtaken, now_ns)

    def _try_admit(self, group: WorkerGroup, sample: Sample, step: Step, now_ns: int) -> WaitReason | None:
        if not group.free_slots:
            return WaitReason.MAX_NUM_SEQS
        if sample.unknown:
            return WaitReason.STEP
        if step.prefill_budget <= 0 or not step.has_room_for(sample):
            return WaitReason.BUDGET
        tables = group.match(sample)
        hits = [block for table in tables for block in table.blocks]
        missing = group.missing(tables, len(sample.tokens))
        if sum(missing) + group.headroom_blocks > group.pool.num_available - group.pool.num_cached_among(hits):
            return WaitReason.BLOCKS
        self._admit(group, sample, tables, missing, step, now_ns)
        return None

    def _admit(
        self,
        group: WorkerGroup,
        sample: Sample,
        tables: list[BlockTable],
        missing: list[int],
        step: Step,
        now_ns: int,
    ) -> None:
        """`tables` hold the sample's prefix hits; as many blocks are `missing` from each."""
        group.waiting.remove(sample)
        for table in tables:
            for block in table.blocks:
                group.pool.share(block)
        sample.num_indexed = tables[0].end
        sample.tables = tables
        group.provide(sample, missing)
        sample.slot = group.free_slots.pop()
        sample.planned = sample.computed = sample.num_indexed * group.spec.block_size
        sample.move(Status.RUNNING)
        self._move_phase(sample, Phase.PREFILL, group, now_ns)
        sample.request.ledger.cached_tokens += sample.planned
        if sample.request.cached_tokens is None:
            sample.request.cached_tokens = sample.planned
        if not sample.incarnation and not sample.wants_prompt_logprobs and self.config.enable_prefix_caching:
            self.counts.prefix_queries += len(sample.tokens)
            self.counts.prefix_hits += sample.planned
        group.running.add(sample)
        step.admit(sample, group.grammars.id_of(sample.structured))
        count = step.cut(self._chunk(len(sample.tokens) - sample.planned))
        step.grant(sample, count)
        step.pending += group.index_full_blocks(sample, sample.planned)

    def _steal(self, group: WorkerGroup, now_ns: int) -> Sample | None:
        """With nobody waiting here: the first of the longest queue that is stuck elsewhere, if it can run here."""
        stuck = [
            other
            for other in self.groups.values()
            if len(other.waiting) and other.clock.reason in (WaitReason.BLOCKS, WaitReason.MAX_NUM_SEQS)
        ]
        if not stuck or not group.free_slots or len(group.preparing):
            return None
        other = max(stuck, key=lambda candidate: len(candidate.waiting))
        sample = other.waiting.samples[0]
        needed = group.most_held(len(sample.tokens)) + group.headroom_blocks
        if sample.unknown or not group.fits(sample.max_len) or needed > group.pool.num_available:
            return None
        other.waiting.remove(sample)
        other.grammars.leave(sample.structured)
        sample.request.ledger.change_queue(group.clock, now_ns)
        self._join(sample, group, now_ns)
        return group.waiting.first

    # After a step.

    def _apply_closely(
        self,
        group: WorkerGroup,
        flight: InFlight,
        row: int,
        sample: Sample,
        token: int | None,
        result: StepResult,
        now_ns: int,
    ) -> bool:
        """One row, in all that it may mean. True where its token is to be told, and goes out alone."""
        if sample.status is Status.ENDED:
            return False
        sample.account()
        if result.prompt_logprobs and row in result.prompt_logprobs:
            sample.describe_prompt(*result.prompt_logprobs[row])
        if token is not None:
            sample.tokens.append(token)
            sample.accounted += 1
        if sample not in flight.left:
            count = flight.plan.counts[row]
            sample.computed += count
            ledger = sample.request.ledger
            ledger.chunks += 1
            ledger.computed_tokens += count
            group.index_full_blocks(sample, sample.computed)
            if token is not None:
                sample.look_ahead(group.spec.block_size)
        if result.grammar_errors and row in result.grammar_errors:
            self._end_unguided(sample, result.grammar_errors[row], now_ns)
            return False
        if token is None:
            return False
        return self._emit_token(sample, token, result.logprobs.get(row), group, now_ns)

    def _emit_token(
        self, sample: Sample, token: int, logprobs: TokenLogprobs | None, group: WorkerGroup, now_ns: int
    ) -> bool:
        """True where the token goes out alone: the caller tells it."""
        request = sample.request
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if sample.wants_prompt_logprobs and len(sample.prompt_logprobs) == sample.prompt_len - 1:
            prompt_logprobs = tuple(sample.prompt_logprobs)
            sample.wants_prompt_logprobs = False
            sample.prompt_logprobs = []
        request.ledger.sampled_tokens += 1
        if sample.phase is Phase.PREFILL:
            self._move_phase(sample, Phase.DECODE, group, now_ns)
        plain = not logprobs and not prompt_logprobs
        if not plain:
            told = (logprobs,) if logprobs else ()
            self._events.append(Tokens(request.key, sample.index, (token,), told, prompt_logprobs))
        if token in sample.stop_token_ids and sample.num_generated > request.submission.stopping.min_tokens:
            self._end(sample, FinishReason.STOP, group, now_ns, stop_token_id=token)
        elif len(sample.tokens) >= sample.max_len:
            self._end(sample, FinishReason.LENGTH, group, now_ns)
        return plain

    def _end_unguided(self, sample: Sample, message: str, now_ns: int) -> None:
        """The grammar turned out to be too much for the worker, or to allow nothing: the last token means nothing."""
        del sample.tokens[-1]
        sample.known -= 1
        sample.accounted -= 1
        self._end_live(sample, FinishReason.ERROR, now_ns, refusal=_wrong(sample.structured, message))

    def _fail_step(self, group: WorkerGroup, now_ns: int) -> None:
        """The oldest plan failed and the worker skips what follows it: what was pending is withdrawn, and every
        running sample falls back to what the index still holds. Who was in too many failed steps ends."""
        culprits = list(dict.fromkeys(row for row in group.in_flight[0].rows if row.status is not Status.ENDED))
        for flight in group.in_flight:
            for block in flight.pending:
                group.pool.withdraw(block)
            for sample in flight.rows:
                sample.known = len(sample.tokens)
            self._note_freed(flight, now_ns)
        group.in_flight.clear()
        self._prepare_again(group, now_ns)
        for sample in reversed(list(group.running)):
            self._preempt(sample, group, PreemptReason.STEP_FAILED, now_ns)
        refusal = Refusal(name="step_failed", message="the model failed on this batch; the server's log says why")
        for sample in culprits:
            sample.failures += 1
            if sample.failures > self.config.max_step_retries:
                self._end_live(sample, FinishReason.ERROR, now_ns, refusal=refusal)

    # One sample's life.

    def _make_request(
        self, submission: Submission, groups: list[WorkerGroup], order: tuple[float, int], now_ns: int
    ) -> tuple[Request, WorkerGroup]:
        request = Request(
            submission=submission,
            order=order,
            max_len=longest_sample(submission, groups, self._limits),
            root=root_hash(self._salt(submission), exact=submission.deterministic),
            ledger=Ledger(now_ns, submission.n, groups[0].clock),
        )
        request.samples.extend(make_samples(request))
        target = self._best_group(request.samples[0])
        assert target is not None, "admission found a group that fits"
        request.ledger.change_queue(target.clock, now_ns)
        return request, target

    def _prepare_again(self, group: WorkerGroup, now_ns: int) -> None:
        """The worker begins afresh, without the grammars that it had."""
        group.grammars.ask_again()
        for sample in [each for each in group.waiting if each.structured]:
            group.waiting.remove(sample)
            self._enqueue(sample, group, now_ns)

    def _join(self, sample: Sample, group: WorkerGroup, now_ns: int) -> None:
        """The sample comes to a group that it was not in."""
        group.grammars.join(sample.structured)
        self._enqueue(sample, group, now_ns)

    def _enqueue(self, sample: Sample, group: WorkerGroup, now_ns: int) -> None:
        sample.group_id = group.id
        sample.backlog = len(sample.tokens) - group.num_warm(sample)
        queue = group.queue_of(sample)
        queue.add(sample)
        if queue is group.preparing:
            sample.request.ledger.change_queue(group.clock, now_ns, WaitReason.GRAMMAR)

    def _best_group(self, sample: Sample) -> WorkerGroup | None:
        """Where the least work stands before the sample's first token: its own tokens that are not warm, those of
        everybody waiting there, and the running ones that share every step."""
        fitting = [group for group in self.groups.values() if group.fits(sample.max_len)]
        if len(fitting) <= 1:
            return fitting[0] if fitting else None

        def work(group: WorkerGroup) -> tuple[int, int, str]:
            cold = len(sample.tokens) - group.num_warm(sample)
            queued = group.waiting.tokens + group.preparing.tokens
            return cold + queued + len(group.running), len(group.running), group.id

        return min(fitting, key=work)

    def _preempt(self, sample: Sample, group: WorkerGroup, reason: PreemptReason, now_ns: int) -> None:
        """Back to the queue, by recompute. It keeps its place in the order: first in line, it never starves."""
        group.running.remove(sample)
        self._release(sample, group)
        self._count_preemption(sample, group, reason, now_ns)
        self._enqueue(sample, group, now_ns)

    def _count_preemption(self, sample: Sample, group: WorkerGroup, reason: PreemptReason, now_ns: int) -> None:
        self.counts.preemptions[reason] += 1
        sample.request.ledger.preemptions += 1
        sample.move(Status.WAITING)
        self._move_phase(sample, Phase.QUEUE, group, now_ns)

    def _release(self, sample: Sample, group: WorkerGroup) -> None:
        group.pool.release_tables(sample.tables)
        group.free_slots.append(sample.slot)
        for flight in group.in_flight:
            flight.left.add(sample)
        sample.forget_progress()

    def _count_abort(self, sample: Sample, now_ns: int) -> None:
        """Its blocks go back at once; the device lets go of them with the last step in flight that computes for it."""
        if sample.status is Status.ENDED:
            return
        self.counts.aborts[sample.phase] += 1
        group = self.groups[sample.group_id]
        last = next((flight for flight in reversed(group.in_flight) if sample in flight.rows), None)
        if last is None:
            self.counts.freed_ns.append(0)
        else:
            last.aborted_ns.append(now_ns)

    def _note_freed(self, flight: InFlight, now_ns: int) -> None:
        """The step is over: nothing computes any more for the samples that were aborted meanwhile."""
        if flight.aborted_ns:
            self.counts.freed_ns.extend(now_ns - aborted_ns for aborted_ns in flight.aborted_ns)

    def _end_live(self, sample: Sample, reason: FinishReason, now_ns: int, *, refusal: Refusal | None = None) -> None:
        if sample.status is not Status.ENDED:
            self._end(sample, reason, self.groups[sample.group_id], now_ns, refusal=refusal)

    def _end(
        self,
        sample: Sample,
        reason: FinishReason,
        group: WorkerGroup,
        now_ns: int,
        *,
        stop_token_id: int = -1,
        refusal: Refusal | None = None,
    ) -> None:
        """The one way out: blocks and slot go back, one SampleEnded goes out, and Released after the last sample."""
        if sample.status is Status.RUNNING:
            group.running.remove(sample)
            self._release(sample, group)
        elif group.id in self.groups:
            group.queue_of(sample).remove(sample)
        if group.id in self.groups:
            group.grammars.leave(sample.structured)
        sample.move(Status.ENDED)
        request = sample.request
        request.refusal = request.refusal or refusal
        self._events.append(SampleEnded(request.key, sample.index, reason, stop_token_id))
        if request.num_live:
            self._move_phase(sample, None, group, now_ns)
            return
        del self.requests[request.key]
        request.account()
        self._events.append(
            Released(
                key=request.key,
                refusal=request.refusal,
                cached_tokens=request.cached_tokens or 0,
                completion_tokens=request.completion_tokens,
                durations=request.ledger.close(now_ns),
            )
        )

    def _move_phase(self, sample: Sample, phase: Phase | None, group: WorkerGroup, now_ns: int) -> None:
        if phase is not sample.phase:
            sample.request.account()
            sample.request.ledger.move(sample.phase, phase, group.clock, now_ns)
            sample.phase = phase or Phase.QUEUE

    def _watch_deadline(self, submission: Submission) -> None:
        heapq.heappush(self._deadlines, (submission.deadline_ns, self._arrivals, submission.key))
        if len(self._deadlines) > 2 * len(self.requests) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self.requests]
            heapq.heapify(self._deadlines)

    def _salt(self, submission: Submission) -> bytes:
        """Without prefix caching a request shares with nobody but its own samples."""
        if self.config.enable_prefix_caching:
            return submission.salt
        return submission.salt + b"\0" + self._arrivals.to_bytes(8, "little")


_ABORT_REFUSALS: dict[AbortCause, Refusal] = {
    AbortCause.CLIENT: Refusal(name="cancelled", message="the client cancelled the request"),
    AbortCause.DEADLINE: Refusal(
        name="deadline_exceeded", message="the deadline passed before the answer was complete; allow more time"
    ),
    AbortCause.STALLED: Refusal(name="client_stalled", message="the client stopped reading its stream"),
    AbortCause.DRAIN: Refusal(
        name="draining", message="the server is shutting down; try another or try again soon", retry_after_ms=1000
    ),
}


def _by_row(plan: StepPlan, result: StepResult) -> Sequence[Any]:
    """The step's token ids; None for rows that sampled none."""
    if 0 not in plan.samples:
        return result.tokens
    tokens = iter(result.tokens)
    return [next(tokens) if samples else None for samples in plan.samples]


def _wrong(structured: Structured | None, what: str) -> Refusal:
    """Of a structure that the worker cannot hold an answer to."""
    field = f"structured.{structured.kind}" if structured else "structured"
    return Refusal(name="invalid_argument", message=f"{field}: {what}", field=field)
