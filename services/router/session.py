"""One request's life at the edge. Read this first.

    admit     a place among the requests in flight, or a refusal that says when to try again
    tokenize  on a thread: chat template, token ids, block hashes of the prompt
    route     the scheduler with most of the prompt warm and least ahead of it
    schedule  from the submit to the scheduler's last word; deltas stream meanwhile
    deliver   from there to the final message

The five are disjoint and sum to the whole. Everything in between is an event that the caller writes when its client
reads; while the client does not, unread deltas merge in the Answer.
"""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from services.router.admission import Admission
from services.router.answer import REFUSAL_OF, Answer
from services.router.fleet import Fleet, Submission
from services.router.model import ServedModel
from services.router.prepare import SALT, Prepared, prepare
from services.router.request import Accepted, Delta, Event, Finished, GenerateOptions, Prompt, Timing, TokenPrompt
from shared.clock import NS_PER_S, NowNs
from shared.outcome import AbortCause, RefusedError
from shared.sampling import NO_LOGPROBS

ACK_TIMEOUT_S = 5.0
"""How long a complete answer waits for the scheduler's account of it (usage and durations)."""
INLINE_TOKENS = 2048
"""A token prompt up to this size is prepared on the loop: hopping to a thread would cost more."""


@dataclass(slots=True)
class _Clock:
    """When each phase of one request ended, in nanoseconds."""

    arrived: int
    admitted: int = 0
    tokenized: int = 0
    submitted: int = 0
    answered: int = 0
    first_token: int = 0

    def timing(self, answer: Answer, now_ns: int) -> Timing:
        schedule = self.answered - self.submitted
        durations = answer.durations
        return Timing(
            total_ns=now_ns - self.arrived,
            admit_ns=self.admitted - self.arrived,
            tokenize_ns=self.tokenized - self.admitted,
            route_ns=self.submitted - self.tokenized,
            schedule_ns=schedule,
            deliver_ns=now_ns - self.answered,
            link_ns=max(0, schedule - durations.total_ns),
            queue_ns=durations.queue_ns,
            prefill_ns=durations.prefill_ns,
            decode_ns=durations.decode_ns,
            time_to_first_token_ns=self.first_token - self.arrived if self.first_token else 0,
            preemptions=durations.preemptions,
            queue_reason_ns=durations.queue_reason_ns,
        )


class Session:
    """Answers requests. One object serves them all; each call of `run` is one request."""

    def __init__(
        self,
        *,
        model: ServedModel,
        fleet: Fleet,
        admission: Admission,
        tokenizing: Executor,
        max_unread_bytes: int,
        now: NowNs,
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._tokenizing = tokenizing
        self._max_unread_bytes = max_unread_bytes
        self._now = now

    async def run(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Event, None]:
        """Accepted, Deltas, one Finished per sample. Raises RefusedError, after ending the samples that had begun.

        Close it (`aclosing`) when the client goes: that is what tells the scheduler.
        """
        clock = _Clock(arrived=self._now())
        with self._admission.admit(options.request_id) as place:
            self._fleet.require_usable()
            clock.admitted = self._now()
            prepared = await self._prepare(prompt, options)
            if place.cause is not None:
                raise RefusedError(REFUSAL_OF[place.cause])
            clock.tokenized = self._now()
            answer = self._submit(prepared, options, clock)
            place.on_abort(answer.abort)
            try:
                async with aclosing(self._stream(answer, prepared, options, clock)) as events:
                    async for event in events:
                        yield event
            finally:
                answer.close(AbortCause.DEADLINE if _expired(options, clock, self._now()) else AbortCause.CLIENT)

    async def _prepare(self, prompt: Prompt, options: GenerateOptions) -> Prepared:
        max_model_len = self._fleet.max_model_len or self._model.max_model_len
        args = (self._model, prompt, options, max_model_len, self._fleet.block_sizes)
        if isinstance(prompt, TokenPrompt) and len(prompt.token_ids) <= INLINE_TOKENS:
            return prepare(*args)
        working = asyncio.get_running_loop().run_in_executor(self._tokenizing, prepare, *args)
        try:
            async with asyncio.timeout(None if options.deadline_ns is None else options.deadline_ns / NS_PER_S):
                return await working
        except TimeoutError:
            raise RefusedError(REFUSAL_OF[AbortCause.DEADLINE]) from None

    def _submit(self, prepared: Prepared, options: GenerateOptions, clock: _Clock) -> Answer:
        link = self._fleet.place(len(prepared.token_ids), prepared.chains)
        answer = Answer(
            options, prepared.token_ids, self._model.tokenizer.texts, prepared.stops, self._max_unread_bytes, self._now
        )
        clock.submitted = self._now()
        submission = Submission(
            request_id=options.request_id,
            token_ids=prepared.token_ids,
            sampling=options.sampling,
            stopping=options.stopping,
            want=options.want,
            n=options.n,
            priority=options.priority,
            deterministic=options.deterministic,
            deadline_in_ns=_time_left(options, clock.submitted - clock.arrived),
            salt=SALT,
        )
        answer.attach(self._fleet.submit(link, submission, answer))
        return answer

    async def _stream(
        self, answer: Answer, prepared: Prepared, options: GenerateOptions, clock: _Clock
    ) -> AsyncGenerator[Event, None]:
        accepted = Accepted(
            request_id=options.request_id, prompt_tokens=len(prepared.token_ids), seed=options.sampling.seed
        )
        waiting = options.want.prompt_logprobs != NO_LOGPROBS
        if not waiting:
            yield accepted
        while True:
            await self._wait(answer, options, clock)
            if waiting and (answer.prompt_logprobs is not None or answer.terminal):
                waiting = False
                yield msgspec.structs.replace(accepted, prompt_logprobs=answer.prompt_logprobs or ())
            for event in answer.take():
                if isinstance(event, Delta) and not clock.first_token:
                    clock.first_token = self._now()
                yield event
            if answer.terminal:
                break
        for finished in self._last(answer, options, clock):
            yield finished
        if answer.refusal is not None:
            raise RefusedError(answer.refusal)

    async def _wait(self, answer: Answer, options: GenerateOptions, clock: _Clock) -> None:
        """For news of the answer, no longer than the deadline allows; for a mere account of it, not for ever."""
        left_ns = _time_left(options, self._now() - clock.arrived)
        timeout_s = left_ns / NS_PER_S if left_ns else None
        if answer.all_ended:
            timeout_s = ACK_TIMEOUT_S if timeout_s is None else min(ACK_TIMEOUT_S, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await answer.wait()
        except TimeoutError:
            if answer.all_ended:
                answer.give_up_account()
            else:
                answer.abort(AbortCause.DEADLINE)

    def _last(self, answer: Answer, options: GenerateOptions, clock: _Clock) -> list[Finished]:
        """The ends that are left; usage and timing on the very last."""
        clock.answered = answer.terminal_ns
        *others, last = answer.take_last()
        timing = clock.timing(answer, self._now()) if options.include_timing else None
        return [*others, msgspec.structs.replace(last, usage=answer.usage, timing=timing)]


def _time_left(options: GenerateOptions, elapsed_ns: int) -> int:
    """Nanoseconds until the deadline, at least 1; 0 without one."""
    return 0 if options.deadline_ns is None else max(1, options.deadline_ns - elapsed_ns)


def _expired(options: GenerateOptions, clock: _Clock, now_ns: int) -> bool:
    return options.deadline_ns is not None and now_ns - clock.arrived >= options.deadline_ns
