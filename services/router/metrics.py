"""What the router exports: latencies and tokens at the edge, and how requests ended. Fed on the event loop."""

from collections.abc import Callable

from services.router.answer import Answer
from services.router.life import Life, Pace, Stream
from services.router.request import Delta, GenerateOptions
from shared.clock import NS_PER_S
from shared.outcome import REFUSALS, FinishReason
from shared.telemetry import metrics
from shared.telemetry.exposition import Exposition, Histogram

AFTER_ADMISSION = frozenset(
    {"cancelled", "client_stalled", "deadline_exceeded", "worker_lost", "scheduler_lost", "step_failed", "internal"}
)
"""Refusals that end a request that had begun. Any other keeps one from beginning."""
DRAINING = "draining"
"""Either: a request that comes too late, or one that the drain cut off."""


class RouterMetrics:
    """Plain numbers, written on the event loop alone."""

    def __init__(self) -> None:
        self._first_token = Histogram(metrics.TIME_TO_FIRST_TOKEN)
        self._between = Histogram(metrics.INTER_TOKEN_LATENCY)
        self._per_token = Histogram(metrics.TIME_PER_OUTPUT_TOKEN)
        self._whole = Histogram(metrics.E2E_LATENCY)
        self._queue = Histogram(metrics.QUEUE_TIME)
        self._prefill = Histogram(metrics.PREFILL_TIME)
        self._decode = Histogram(metrics.DECODE_TIME)
        self._prompt_sizes = Histogram(metrics.REQUEST_PROMPT_TOKENS)
        self._answer_sizes = Histogram(metrics.REQUEST_GENERATION_TOKENS)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0
        self._ends = {reason.value: 0 for reason in FinishReason}
        self._rejections = {name: 0 for name in REFUSALS if name not in AFTER_ADMISSION}

    def exposition(self, *, lag: Histogram, num_dropped_spans: Callable[[], int]) -> Exposition:
        """To be read from any thread."""
        return Exposition(
            metrics.EXPORTED["router"],
            {
                metrics.TIME_TO_FIRST_TOKEN.name: lambda: self._first_token,
                metrics.INTER_TOKEN_LATENCY.name: lambda: self._between,
                metrics.TIME_PER_OUTPUT_TOKEN.name: lambda: self._per_token,
                metrics.E2E_LATENCY.name: lambda: self._whole,
                metrics.QUEUE_TIME.name: lambda: self._queue,
                metrics.PREFILL_TIME.name: lambda: self._prefill,
                metrics.DECODE_TIME.name: lambda: self._decode,
                metrics.REQUEST_PROMPT_TOKENS.name: lambda: self._prompt_sizes,
                metrics.REQUEST_GENERATION_TOKENS.name: lambda: self._answer_sizes,
                metrics.PROMPT_TOKENS.name: lambda: self._prompt_tokens,
                metrics.GENERATION_TOKENS.name: lambda: self._generated_tokens,
                metrics.PROMPT_TOKENS_CACHED.name: lambda: self._cached_tokens,
                metrics.REQUEST_SUCCESS.name: lambda: self._ends,
                metrics.ADMISSION_REJECTIONS.name: lambda: self._rejections,
                metrics.SPANS_DROPPED.name: num_dropped_spans,
                metrics.LOOP_LAG.name: lambda: lag,
            },
        )

    # While a request runs.

    def on_first_token(self, life: Life, prompt_tokens: int) -> None:
        self._first_token.observe((life.first_token - life.arrived) / NS_PER_S)
        self._prompt_tokens += prompt_tokens

    def on_delta(self, pace: Pace, delta: Delta, now_ns: int) -> None:
        """A delta is handed to the client. Takes about 0.5 µs."""
        number = len(delta.token_ids)
        pace.tokens += number
        self._generated_tokens += number
        stream = pace.streams.get(delta.index)
        if stream is None:
            pace.streams[delta.index] = Stream(now_ns, now_ns, number)
            return
        self._between.observe((now_ns - stream.last_ns) / NS_PER_S)
        stream.last_ns = now_ns
        stream.tokens += number

    # When it ends.

    def reject(self, name: str) -> None:
        """A refusal of a request that had not begun."""
        self._rejections[name] += 1

    def on_end(self, options: GenerateOptions, life: Life, end: str, now_ns: int) -> None:
        """`end` is "answered", "left" or the name of a refusal."""
        if _is_rejection(life, end):
            return self.reject(end)
        self._whole.observe((now_ns - life.arrived) / NS_PER_S)
        if life.answer is None:
            self._ends[FinishReason.ABORT.value] += options.n
            return
        self._count_answer(life.answer, life.pace)

    def _count_answer(self, answer: Answer, pace: Pace) -> None:
        usage, durations = answer.usage, answer.durations
        self._generated_tokens += usage.completion_tokens - pace.tokens  # what nobody was there to be handed
        self._cached_tokens += usage.cached_tokens
        self._prompt_sizes.observe(usage.prompt_tokens)
        self._answer_sizes.observe(usage.completion_tokens)
        for reason in answer.finish_reasons:
            self._ends[reason or FinishReason.ABORT.value] += 1
        for stream in pace.streams.values():
            if stream.tokens > 1 and stream.last_ns > stream.first_ns:
                self._per_token.observe((stream.last_ns - stream.first_ns) / NS_PER_S / (stream.tokens - 1))
        if durations.total_ns:
            self._queue.observe(durations.queue_ns / NS_PER_S)
        if durations.prefill_ns:
            self._prefill.observe(durations.prefill_ns / NS_PER_S)
        if durations.decode_ns:
            self._decode.observe(durations.decode_ns / NS_PER_S)


def _is_rejection(life: Life, end: str) -> bool:
    """Whether the request was refused before it began."""
    if end not in REFUSALS or end in AFTER_ADMISSION or life.first_token:
        return False
    return end != DRAINING or life.answer is None or not life.answer.durations.total_ns
