"""When each phase of a request ended, and the two accounts that are made of it: Timing for its client, and a Trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from services.router.answer import Answer
from services.router.fleet.values import Placed, Segment
from services.router.request import Delta, GenerateOptions, Prompt, Timing
from shared.clock import NS_PER_MS, NS_PER_S
from shared.telemetry import names
from shared.telemetry.context import TraceContext
from shared.telemetry.spans import Attribute, Span, Trace

ROUTER, SCHEDULER = "router", "scheduler"
WHOLE, SCHEDULED = 0, 4
"""Where `generate` and `schedule` stand among a trace's spans."""


@dataclass(slots=True)
class Stream:
    """One sample's tokens on their way to the client: when its first and its last delta were handed over."""

    first_ns: int
    last_ns: int
    tokens: int


@dataclass(slots=True)
class Pace:
    """What one request's client was handed, by sample and in all."""

    streams: dict[int, Stream] = field(default_factory=dict)
    tokens: int = 0


@dataclass(slots=True)
class Transcript:
    """What was asked and what the client was handed, where an operator wants it in the log (`--log-content`)."""

    prompt: Prompt
    answers: dict[int, str] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        self.answers[delta.index] = self.answers.get(delta.index, "") + delta.text

    def facts(self) -> dict[str, Any]:
        return {"prompt": msgspec.to_builtins(self.prompt), "answers": list(self.answers.values())}


@dataclass(slots=True)
class Life:
    """One request, in nanoseconds of the router's clock (0: not reached); its answer once there is one."""

    arrived: int
    operation: str
    context: TraceContext
    admitted: int = 0
    tokenized: int = 0
    submitted: int = 0
    first_token: int = 0
    accepted: bool = False
    """Whether the client has been told so."""
    blocked_ns: int = 0
    """How long its events waited for the client to take them."""
    placed: Placed | None = None
    answer: Answer | None = None
    pace: Pace = field(default_factory=Pace)
    transcript: Transcript | None = None
    refused_field: str = ""
    """What the refusal that ended it named, if any did."""

    def timing(self, answer: Answer, now_ns: int) -> Timing:
        """The account of an answer that is terminal."""
        schedule, durations = answer.terminal_ns - self.submitted, answer.durations
        inside = durations.queue_ns + durations.prefill_ns + durations.decode_ns
        return Timing(
            total_ns=now_ns - self.arrived,
            admit_ns=self.admitted - self.arrived,
            tokenize_ns=self.tokenized - self.admitted,
            route_ns=self.submitted - self.tokenized,
            schedule_ns=schedule,
            deliver_ns=now_ns - answer.terminal_ns,
            link_ns=max(0, schedule - inside),
            queue_ns=durations.queue_ns,
            prefill_ns=durations.prefill_ns,
            decode_ns=durations.decode_ns,
            time_to_first_token_ns=self.first_token - self.arrived if self.first_token else 0,
            preemptions=durations.preemptions,
            queue_reason_ns=durations.queue_reason_ns,
        )

    def trace(self, options: GenerateOptions, *, instance: str, end: str, now_ns: int, wall_ns: int) -> Trace:
        """The account of a request that ended at `now_ns`, which was `wall_ns` by the wall clock. `end` is "answered",
        "left" or the name of a refusal."""
        total_ns = now_ns - self.arrived
        failure = "" if end == "answered" else end

        def span(name: str, start_ns: int, end_ns: int, parent: int = WHOLE) -> Span:
            return Span(name=name, service=ROUTER, instance=instance, parent=parent, start_ns=start_ns, end_ns=end_ns)

        whole = span(names.GENERATE, 0, total_ns, -1)
        whole.attributes, whole.error = self._whole(options, end, total_ns), failure
        phases = [span(name, begin, over) for name, begin, over in self._phases(total_ns)]
        spans = [whole, *phases]
        if self.placed is not None and len(phases) > 2:
            phases[2].attributes = _of_route(self.placed)
        if self.placed is not None and self.answer is not None and len(spans) > SCHEDULED:
            spans += _inside(spans[SCHEDULED], self.answer, self.placed.scheduler)
        if failure:
            self._blame(spans, failure)
        context = self.context
        return Trace(
            request_id=options.request_id,
            trace_id=context.trace_id,
            root_id=context.span_id,
            parent_id=context.parent_id,
            state=context.state,
            sampled=context.sampled,
            arrived_ns=wall_ns - total_ns,
            spans=spans,
        )

    def _blame(self, spans: list[Span], failure: str) -> None:
        """Marks the phase that failed: the last one, unless the scheduler's account ended badly before it."""
        if self.answer is not None and self.answer.terminal and self.answer.refusal is not None:
            spans[SCHEDULED].error = spans[-1].error = failure
        else:
            spans[max(at for at, span in enumerate(spans) if span.parent <= WHOLE)].error = failure

    def _phases(self, total_ns: int) -> list[tuple[str, int, int]]:
        """Each that was reached, with its beginning and its end; the last one ends with the request."""
        terminal = self.answer.terminal_ns if self.answer is not None else 0
        ends = [self.admitted, self.tokenized, self.submitted, terminal, 0]
        reached = next((i for i, moment in enumerate(ends) if not moment), len(ends) - 1)
        borders = [0, *(moment - self.arrived for moment in ends[:reached]), total_ns]
        phases = (names.ADMIT, names.TOKENIZE, names.ROUTE, names.SCHEDULE, names.DELIVER)
        return [(name, begin, over) for name, (begin, over) in zip(phases, pairwise(borders), strict=False)]

    def _whole(self, options: GenerateOptions, end: str, total_ns: int) -> dict[str, Attribute]:
        attributes = _asked(options, self.operation) | {names.END: end, names.LATENCY_E2E: total_ns / NS_PER_S}
        if end not in ("answered", "left"):
            attributes[names.ERROR_TYPE] = end
        if self.first_token:
            first_s = (self.first_token - self.arrived) / NS_PER_S
            attributes |= {names.TIME_TO_FIRST_CHUNK: first_s, names.LATENCY_FIRST_TOKEN: first_s}
        if self.blocked_ns:
            attributes[names.BLOCKED_MS] = _ms(self.blocked_ns)
        if self.answer is not None:
            attributes |= _answered(self.answer)
        return attributes


def _asked(options: GenerateOptions, operation: str) -> dict[str, Attribute]:
    sampling = options.sampling
    attributes: dict[str, Attribute] = {
        names.OPERATION: operation,
        names.DOOR: options.door,
        names.REQUEST_MODEL: options.model,
        names.RESPONSE_ID: options.request_id,
        names.REQUEST_ID: options.request_id,
        names.TEMPERATURE: sampling.temperature,
        names.TOP_P: sampling.top_p,
        names.SEED: str(sampling.seed),  # 64 bits without a sign do not fit OTLP's integers
    }
    if options.stopping.max_tokens:
        attributes[names.MAX_TOKENS] = options.stopping.max_tokens
    if sampling.top_k:
        attributes[names.TOP_K] = sampling.top_k
    if options.n > 1:
        attributes[names.NUM_SAMPLES] = options.n
    if options.priority:
        attributes[names.PRIORITY] = options.priority
    if options.deterministic:
        attributes[names.DETERMINISTIC] = True
    return attributes


def _answered(answer: Answer) -> dict[str, Attribute]:
    usage, durations = answer.usage, answer.durations
    return {
        names.FINISH_REASONS: answer.finish_reasons,
        names.INPUT_TOKENS: usage.prompt_tokens,
        names.OUTPUT_TOKENS: usage.completion_tokens,
        names.CACHED_TOKENS: usage.cached_tokens,
        names.LATENCY_QUEUE: durations.queue_ns / NS_PER_S,
        names.LATENCY_PREFILL: durations.prefill_ns / NS_PER_S,
        names.LATENCY_DECODE: durations.decode_ns / NS_PER_S,
        names.PREEMPTIONS: durations.preemptions,
    }


def _of_route(placed: Placed) -> dict[str, Attribute]:
    return {
        names.CANDIDATES: placed.candidates,
        names.COSTS: placed.costs,
        names.CHOSEN: placed.target,
        names.WARM_TOKENS: placed.overlap_tokens,
    }


def _inside(schedule: Span, answer: Answer, scheduler: str) -> list[Span]:
    """The children of `schedule`: the link's share, then the scheduler's account in order. They fill it."""
    segments = answer.durations.segments
    at = schedule.start_ns + max(0, schedule.duration_ns - sum(segment.ns for segment in segments))
    link = Span(
        name=names.LINK,
        service=ROUTER,
        instance=schedule.instance,
        parent=SCHEDULED,
        start_ns=schedule.start_ns,
        end_ns=at,
    )
    spans = [link]
    for segment in segments:
        over = min(at + segment.ns, schedule.end_ns)
        spans.append(
            Span(
                name=segment.phase,
                service=SCHEDULER,
                instance=scheduler,
                parent=SCHEDULED,
                start_ns=at,
                end_ns=over,
                attributes=_of_segment(segment),
            )
        )
        at = over
    return spans


def _of_segment(segment: Segment) -> dict[str, Attribute]:
    if segment.phase == names.QUEUE:
        return _of_wait(segment.reason_ns)
    # The first step of a phase may have begun before it: another was under way.
    device_ns = min(segment.device_ns, segment.ns)
    attributes: dict[str, Attribute] = {names.STEPS: segment.steps, names.DEVICE_MS: _ms(device_ns)}
    if segment.steps:
        attributes[names.BATCH_MEAN] = round(segment.rows / segment.steps, 2)
    if segment.phase == names.DECODE:
        return attributes | {names.DECODE_TOKENS: segment.sampled_tokens, names.PREEMPTIONS: segment.preemptions}
    return attributes | {
        names.CHUNKS: segment.chunks,
        names.COMPUTED_TOKENS: segment.computed_tokens,
        names.PREFILL_CACHED_TOKENS: segment.cached_tokens,
    }


def _of_wait(reason_ns: Mapping[str, int]) -> dict[str, Attribute]:
    """Why it waited: the longest reason, and the time of each."""
    if not reason_ns:
        return {}
    longest = max(reason_ns, key=lambda reason: reason_ns[reason])
    by_reason = {names.WAIT_MS.format(reason): _ms(waited_ns) for reason, waited_ns in reason_ns.items()}
    return {names.WAIT_REASON: longest, **by_reason}


def _ms(value_ns: int) -> float:
    return round(value_ns / NS_PER_MS, 3)
