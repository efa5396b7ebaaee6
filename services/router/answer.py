"""The answer to one request as it grows: tokens in, events out. Synchronous, never waits, never blocks a link."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.router.fleet.values import Durations, Release, Ticket
from services.router.request import Delta, Event, Finished, GenerateOptions, TokenLogprob, Usage
from shared.clock import NowNs
from shared.outcome import AbortCause, FinishReason, Refusal
from shared.sampling import NO_LOGPROBS, TokenLogprobs
from shared.text.detokenizer import Detokenizer, TokenTexts
from shared.text.stops import StopMatcher, StopStrings

EVERY_SAMPLE = -1
TOKEN_BYTES = 8
"""What an unread token is counted as, beside its text."""
TOP_BYTES = 32

REFUSAL_OF = {
    AbortCause.CLIENT: Refusal(name="cancelled", message="the request was aborted"),
    AbortCause.DEADLINE: Refusal(
        name="deadline_exceeded", message="the deadline passed before the answer was complete"
    ),
    AbortCause.STALLED: Refusal(name="client_stalled", message="the client stopped reading; the answer was ended"),
    AbortCause.DRAIN: Refusal(
        name="draining", message="this router shut down before the answer was complete", retry_after_ms=1_000
    ),
}
ABORTS = frozenset({"cancelled", "deadline_exceeded", "client_stalled", "draining"})
"""Refusals that end a sample with ABORT; any other ends it with ERROR."""


@dataclass(slots=True)
class _Sample:
    """One sample: what is decoded, what is not yet sent, how it ended."""

    detokenizer: Detokenizer
    matcher: StopMatcher | None
    num_tokens: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    stop: str | None = None
    stop_token_id: int | None = None
    announced: bool = False
    """Its Finished has been taken."""


class Answer:
    """Takes a link's events for one request (a fleet Sink) and keeps what the client has not read, bounded.

    Ends in one of two ways: every sample ended well, or a refusal (`refusal`). Either is `over`; `terminal` is it once
    the scheduler has released the request, or is no longer waited for.
    """

    def __init__(
        self,
        options: GenerateOptions,
        prompt_ids: Sequence[int],
        texts: TokenTexts,
        stops: StopStrings | None,
        max_unread_bytes: int,
        now: NowNs,
    ) -> None:
        self._options = options
        self._now = now
        self.prompt_ids = prompt_ids
        self._texts = texts
        self._max_unread_bytes = max_unread_bytes
        self._unread_bytes = 0
        self._samples = [
            _Sample(
                texts.stream(
                    prompt_ids, skip_special_tokens=options.skip_special_tokens, shown=options.shown_token_ids
                ),
                StopMatcher(stops) if stops else None,
            )
            for _ in range(options.n)
        ]
        self._changed = False
        """Since the last wait."""
        self._waiting: asyncio.Future[None] | None = None
        self._ticket: Ticket | None = None
        self.refusal: Refusal | None = None
        self.release: Release | None = None
        self.terminal_ns = 0
        """When nothing more could come; 0 until then."""
        self._prompt_given: list[TokenLogprobs] = []
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        """Of every prompt token if wanted, once all are known; a prompt of one token has none to wait for."""
        if options.want.prompt_logprobs != NO_LOGPROBS and len(prompt_ids) == 1:
            self.prompt_logprobs = (TokenLogprob(prompt_ids[0]),)

    def attach(self, ticket: Ticket) -> None:
        """The request is on its way to a scheduler."""
        self._ticket = ticket

    @property
    def all_ended(self) -> bool:
        return all(sample.reason is not None for sample in self._samples)

    @property
    def over(self) -> bool:
        """Nothing more can come but the scheduler's account."""
        return self.refusal is not None or self.all_ended

    @property
    def terminal(self) -> bool:
        """Nothing more can come."""
        return self.release is not None and self.over

    @property
    def durations(self) -> Durations:
        return self.release.durations if self.release else Durations()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=sum(sample.num_tokens for sample in self._samples),
            cached_tokens=self.release.cached_tokens if self.release else 0,
        )

    @property
    def finish_reasons(self) -> list[str]:
        """Of each sample; "" while it has not ended."""
        return [sample.reason.value if sample.reason else "" for sample in self._samples]

    # What the link says (fleet Sink).

    def on_tokens(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        prompt_logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """Decodes, looks for stop strings, and ends the sample where one is found: what follows is dropped."""
        if self.refusal is not None:
            return
        sample = self._samples[index]
        if prompt_logprobs:
            self._take_prompt_logprobs(prompt_logprobs)
        for position, token_id in enumerate(token_ids):
            if sample.reason is not None:
                break
            given = logprobs[position] if position < len(logprobs) else None
            self._take_token(index, sample, token_id, given)
        self._change()
        if self._unread_bytes > self._max_unread_bytes:
            self.abort(AbortCause.STALLED)

    def on_end(self, index: int, reason: FinishReason, stop_token_id: int) -> None:
        """The scheduler ended a sample; one that a stop string ended before keeps that end."""
        sample = self._samples[index]
        if self.refusal is not None:
            return
        if sample.reason is None and reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._flush(sample)
            if sample.stop is None:
                sample.reason = reason
                sample.stop_token_id = stop_token_id if stop_token_id >= 0 else None
        self._change()

    def on_release(self, release: Release) -> None:
        """The last word. Without a refusal, samples that have not ended well were ended by someone unnamed."""
        self.release = release
        if self.refusal is None and not self.all_ended:
            self.refusal = release.refusal or REFUSAL_OF[AbortCause.CLIENT]
        self._settle()

    def give_up_account(self) -> None:
        """The answer is over and the scheduler does not say what it took: usage lacks cached tokens, timing the
        scheduler's part."""
        self.release = self.release or Release()
        self._settle()

    def _settle(self) -> None:
        self.terminal_ns = self.terminal_ns or self._now()
        self._change()

    def _take_token(self, index: int, sample: _Sample, token_id: int, given: TokenLogprobs | None) -> None:
        sample.num_tokens += 1
        sample.token_ids.append(token_id)
        self._unread_bytes += TOKEN_BYTES
        if given is not None:
            sample.logprobs.append(self._logprob(token_id, given))
            self._unread_bytes += TOP_BYTES * (1 + len(given.top_ids))
        if token_id in self._options.stopping.stop_token_ids:
            return  # it ends the answer and is no part of its text
        self._take_text(sample, sample.detokenizer.push(token_id))
        if sample.stop is not None:
            sample.reason = FinishReason.STOP
            if self._ticket is not None:
                self._ticket.abort(index, AbortCause.STOP_STRING)

    def _take_text(self, sample: _Sample, text: str) -> None:
        if sample.matcher is not None and sample.num_tokens > self._options.stopping.min_tokens:
            found = sample.matcher.push(text)
            text, sample.stop = found.text, found.stop
        if text:
            sample.text.append(text)
            self._unread_bytes += len(text)

    def _flush(self, sample: _Sample) -> None:
        """Text that was held back comes out, unless it completes a stop string after all."""
        self._take_text(sample, sample.detokenizer.finish())
        if sample.stop is not None:
            sample.reason = FinishReason.STOP
        elif sample.matcher is not None:
            sample.text.append(sample.matcher.flush())

    def _logprob(self, token_id: int, given: TokenLogprobs) -> TokenLogprob:
        token_bytes = self._texts.token_bytes
        top = tuple(
            (other, logprob, token_bytes(other))
            for other, logprob in zip(given.top_ids, given.top_logprobs, strict=True)
        )
        return TokenLogprob(token_id, given.logprob, given.rank, top)

    def _take_prompt_logprobs(self, given: Sequence[TokenLogprobs]) -> None:
        """They may come in several parts; `prompt_logprobs` is set once there is one per token."""
        self._prompt_given.extend(given)
        first, *rest = self.prompt_ids
        if len(self._prompt_given) >= len(rest):
            pairs = zip(rest, self._prompt_given, strict=True)
            self.prompt_logprobs = (TokenLogprob(first), *(self._logprob(one, its) for one, its in pairs))

    # Ending early.

    def abort(self, cause: AbortCause) -> None:
        """Ends the request from this side; the scheduler is told, and its account may still come. What is unread of a
        stalled client is dropped. An answer that lacks only the scheduler's account of it ends well, without one."""
        if self.terminal or self.refusal is not None:
            return
        if self.all_ended:
            return self.give_up_account()
        self.refusal = REFUSAL_OF[cause]
        if cause is AbortCause.STALLED:
            for sample in self._samples:
                sample.text, sample.token_ids, sample.logprobs = [], [], []
        if self._ticket is not None and self.release is None:
            self._ticket.abort(EVERY_SAMPLE, cause)
        self._change()

    def close(self) -> None:
        """The session is over, and so is the answer: nothing more is taken."""
        if not self.terminal:
            self.give_up_account()
        if self._ticket is not None:
            self._ticket.forget()

    # What the client has not read.

    async def wait(self) -> None:
        """Until something changed since the last call. One waits at a time."""
        if not self._changed:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        self._changed = False

    def _change(self) -> None:
        self._changed = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def take(self) -> list[Event]:
        """Everything unread: at most one Delta per sample, then the ends of samples but for the last, which needs
        `take_last`."""
        self._unread_bytes = 0
        events: list[Event] = []
        for index, sample in enumerate(self._samples):
            if sample.token_ids or sample.text:
                events.append(_delta(index, sample))
            if sample.reason is not None and not sample.announced and self._num_unannounced > 1:
                events.append(_finish(index, sample))
        return events

    @property
    def _num_unannounced(self) -> int:
        return sum(not sample.announced for sample in self._samples)

    def take_last(self) -> list[Finished]:
        """The ends that are left, once `terminal`: at least one. Samples that were cut off end as the refusal says."""
        cut = FinishReason.ERROR
        if self.refusal is not None and self.refusal.name in ABORTS:
            cut = FinishReason.ABORT
        events = []
        for index, sample in enumerate(self._samples):
            sample.reason = sample.reason or cut
            if not sample.announced:
                events.append(_finish(index, sample))
        return events


def _delta(index: int, sample: _Sample) -> Delta:
    delta = Delta(
        index=index,
        text="".join(sample.text),
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(sample.logprobs),
    )
    sample.text, sample.token_ids, sample.logprobs = [], [], []
    return delta


def _finish(index: int, sample: _Sample) -> Finished:
    assert sample.reason is not None
    sample.announced = True
    return Finished(index=index, reason=sample.reason, stop=sample.stop, stop_token_id=sample.stop_token_id)
