"""One request's life at the edge. Read this first.

    admit     a place among the requests in flight, or a refusal that says when to try again
    tokenize  on a thread: chat template, token ids, block hashes of the prompt; before it, on another, whether a
              structure compiles
    route     the scheduler with most of the prompt warm and least ahead of it
    schedule  from the submit to the scheduler's last word; deltas stream meanwhile
    deliver   from there to the final message

The five are disjoint and sum to the whole. Everything in between is an event that the caller writes when its client
reads; while the client does not, unread deltas merge in the Answer.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import Any

import msgspec
import structlog

from services.router.admission import Admission, Place
from services.router.answer import REFUSAL_OF, Answer
from services.router.fleet import Fleet, Submission
from services.router.life import Life, Transcript
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel
from services.router.prepare import Prepared, prepare
from services.router.rejections import Rejections
from services.router.request import Accepted, ChatPrompt, Delta, Event, Finished, GenerateOptions, Prompt, TokenPrompt
from services.router.structured import require_compiling
from services.router.traces import Traces
from services.router.turns import FairThread
from shared.clock import NS_PER_MS, NS_PER_S, NowNs
from shared.outcome import AbortCause, RefusedError
from shared.sampling import NO_LOGPROBS

log = structlog.get_logger("session")

ACK_TIMEOUT_S = 5.0
"""How long a complete answer waits for the scheduler's account of it (usage and durations)."""
ABORT_ACK_TIMEOUT_S = 1.0
"""How long one that was ended early does."""
DRAIN_ACK_TIMEOUT_S = 0.1
"""And one that the drain ended: a second signal leaves its client little time to be told."""
DEADLINE_SLACK_NS = 20 * NS_PER_MS
"""A client that goes so shortly before its deadline went because of it: its clock started before ours."""
BLOCKED_FROM_NS = 20 * NS_PER_MS
"""A write that takes so long waited for its client; a shorter one is what a write costs beside others."""
INLINE_TOKENS = 2048
"""A token prompt up to this size is prepared on the loop: hopping to a thread would cost more."""


class Session:
    """Answers requests. One object serves them all; each call of `run` is one request."""

    def __init__(
        self,
        *,
        model: ServedModel,
        fleet: Fleet,
        admission: Admission,
        tokenizing: Executor,
        checking: FairThread,
        max_unread_bytes: int,
        traces: Traces,
        metrics: RouterMetrics,
        rejections: Rejections,
        instance: str,
        now: NowNs,
        wall: NowNs = time.time_ns,
        log_content: bool = False,
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._tokenizing = tokenizing
        self._checking = checking
        """Of structures: one may take seconds, in which only others with a structure are to wait, each tenant's in
        turn."""
        self._max_unread_bytes = max_unread_bytes
        self._traces = traces
        self._metrics = metrics
        self._rejections = rejections
        self._instance = instance
        self._now = now
        self._wall = wall
        self._log_content = log_content
        self._accounts: set[asyncio.Task[None]] = set()
        """Of requests whose client is gone: nobody but the log waits for what the scheduler says of them."""

    async def run(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Event, None]:
        """Accepted, Deltas, one Finished per sample. Raises RefusedError, after ending the samples that had begun.

        Close it (`aclosing`) when the client goes: that is what tells the scheduler.
        """
        life, end = Life(self._now(), _operation(prompt), self._traces.begin(options.caller)), "left"
        life.transcript = Transcript(prompt) if self._log_content else None
        try:
            with self._admission.admit(options.request_id, options.key) as place:
                answer = await self._begin(prompt, options, place, life)
                deadline = _at_deadline(options, self._now() - life.arrived, answer)
                try:
                    finished = False
                    while not finished:
                        finished = answer.terminal
                        for event in self._unread(answer, options, life):
                            given_ns = self._give(event, life)
                            yield event
                            took_ns = self._now() - given_ns
                            life.blocked_ns += took_ns if took_ns > BLOCKED_FROM_NS else 0
                        if not finished:
                            await (_wait_account(answer) if answer.over else answer.wait())
                finally:
                    if deadline is not None:
                        deadline.cancel()
                    answer.abort(AbortCause.DEADLINE if self._expired(options, life) else AbortCause.CLIENT)
            if answer.refusal is not None:
                raise RefusedError(answer.refusal)
            end = "answered"
        except RefusedError as error:
            end, life.refused_field = error.refusal.name, error.refusal.field
            raise
        finally:
            self._account(options, life, self._why_left(options, life) if end == "left" else end)

    async def _begin(self, prompt: Prompt, options: GenerateOptions, place: Place, life: Life) -> Answer:
        """Each phase after the next, until the request is on its way to a scheduler."""
        self._fleet.require_usable()
        life.admitted = self._now()
        prepared = await self._prepare(prompt, options)
        if place.cause is not None:
            raise RefusedError(REFUSAL_OF[place.cause])
        life.tokenized = self._now()
        life.answer = self._submit(prepared, options, life)
        place.on_abort(life.answer.abort)
        return life.answer

    def _why_left(self, options: GenerateOptions, life: Life) -> str:
        """How a request ended that nobody could be told of: its caller was gone, and perhaps for a reason."""
        if self._expired(options, life):
            return REFUSAL_OF[AbortCause.DEADLINE].name
        refusal = life.answer.refusal if life.answer is not None else None
        return "left" if refusal is None or refusal is REFUSAL_OF[AbortCause.CLIENT] else refusal.name

    def _expired(self, options: GenerateOptions, life: Life) -> bool:
        elapsed_ns = self._now() - life.arrived
        return options.deadline_ns is not None and elapsed_ns + DEADLINE_SLACK_NS >= options.deadline_ns

    async def _prepare(self, prompt: Prompt, options: GenerateOptions) -> Prepared:
        max_model_len = self._fleet.max_model_len or self._model.max_model_len
        args = (self._model, prompt, options, max_model_len, self._fleet.block_sizes)
        if (
            isinstance(prompt, TokenPrompt)
            and len(prompt.token_ids) <= INLINE_TOKENS
            and not options.stop
            and not options.structured
        ):
            return prepare(*args)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None if options.deadline_ns is None else options.deadline_ns / NS_PER_S):
                if options.structured is not None:
                    await self._checking.run(options.key.tenant, require_compiling, options.structured)
                return await loop.run_in_executor(self._tokenizing, prepare, *args)
        except TimeoutError:
            raise RefusedError(REFUSAL_OF[AbortCause.DEADLINE]) from None

    def _submit(self, prepared: Prepared, options: GenerateOptions, life: Life) -> Answer:
        link, life.placed = self._fleet.place(len(prepared.token_ids), prepared.chains)
        texts = self._model.tokenizer.texts
        answer = Answer(options, prepared.token_ids, texts, prepared.stops, self._max_unread_bytes, self._now)
        life.submitted = self._now()
        submission = Submission(
            request_id=options.request_id,
            token_ids=prepared.token_ids,
            sampling=options.sampling,
            stopping=options.stopping,
            want=options.want,
            structured=prepared.structured,
            n=options.n,
            priority=options.priority,
            deterministic=options.deterministic,
            deadline_in_ns=_time_left(options, life.submitted - life.arrived),
            salt=options.salt,
            trace=life.context.link,
        )
        answer.attach(self._fleet.submit(link, submission, answer))
        return answer

    def _unread(self, answer: Answer, options: GenerateOptions, life: Life) -> list[Event]:
        """Accepted (late where it carries the prompt's logprobs), what the client has not read, the last ends once
        nothing more can come."""
        events: list[Event] = []
        if not life.accepted:
            waits = options.want.prompt_logprobs != NO_LOGPROBS and answer.prompt_logprobs is None
            if waits and not answer.terminal:
                return []
            life.accepted = True
            events.append(_accepted(answer, options))
        unread = answer.take()
        if not life.first_token and any(isinstance(event, Delta) for event in unread):
            life.first_token = self._now()
            self._metrics.on_first_token(life, answer.usage.prompt_tokens)
        events += unread
        if answer.terminal:
            events += self._last(answer, options, life)
        return events

    def _give(self, event: Event, life: Life) -> int:
        """The event goes to the client, now: the time."""
        now_ns = self._now()
        if isinstance(event, Delta):
            self._metrics.on_delta(life.pace, event, now_ns)
            if life.transcript is not None:
                life.transcript.add(event)
        return now_ns

    def _last(self, answer: Answer, options: GenerateOptions, life: Life) -> list[Finished]:
        """The ends that are left; usage and timing on the very last."""
        *others, last = answer.take_last()
        timing = life.timing(answer, self._now()) if options.include_timing else None
        return [*others, msgspec.structs.replace(last, usage=answer.usage, timing=timing)]

    def _account(self, options: GenerateOptions, life: Life, end: str) -> None:
        """Logs the request, once the scheduler has said what it took."""
        answer = life.answer
        if answer is None or answer.terminal:
            if answer is not None:
                answer.close()
            return self._close(options, life, end)
        waiting = asyncio.create_task(self._log_later(options, life, answer, end), name="account")
        self._accounts.add(waiting)
        waiting.add_done_callback(self._accounts.discard)

    async def _log_later(self, options: GenerateOptions, life: Life, answer: Answer, end: str) -> None:
        try:
            while not answer.terminal:
                await (_wait_account(answer) if answer.over else answer.wait())
        finally:
            answer.close()
            self._close(options, life, end)

    def _close(self, options: GenerateOptions, life: Life, end: str) -> None:
        """The request's trace, what it counts for, and its line in the log."""
        now_ns = self._now()
        self._metrics.on_end(options, life, end, now_ns)
        if life.answer is not None:
            usage = life.answer.usage
            self._admission.allowances.spend(options.key, usage.prompt_tokens + usage.completion_tokens)
        trace = life.trace(options, instance=self._instance, end=end, now_ns=now_ns, wall_ns=self._wall())
        self._traces.add(trace)
        if life.admitted:
            self._log(options, life, end, now_ns)
        else:
            self._rejections.tell(end, field=life.refused_field, request_id=options.request_id, door=options.door)

    def _log(self, options: GenerateOptions, life: Life, end: str, now_ns: int) -> None:
        """One wide event. Neither prompt nor answer, unless the operator wants both."""
        answer = life.answer
        facts: dict[str, Any] = {
            "trace_id": life.context.trace_id.hex(),
            "operation": life.operation,
            "door": options.door,
            **({"api_key": options.key.name} if options.key.name else {}),
            **({"field": life.refused_field} if life.refused_field else {}),
            "model": options.model,
            "max_tokens": options.stopping.max_tokens,
            "priority": options.priority,
            "total_ms": _ms(now_ns - life.arrived),
            "blocked_ms": _ms(life.blocked_ns),
        }
        if life.placed is not None:
            facts["scheduler"] = life.placed.target
        if answer is not None:
            facts |= msgspec.structs.asdict(answer.usage) | {"finish_reasons": answer.finish_reasons}
        if answer is not None and answer.terminal:
            timing = msgspec.structs.asdict(life.timing(answer, now_ns))
            facts["preemptions"] = timing["preemptions"]
            facts |= {name[:-3] + "_ms": _ms(value) for name, value in timing.items() if name.endswith("_ns") and value}
        if life.transcript is not None:
            facts |= life.transcript.facts()
        log.info("request", request_id=options.request_id, end=end, n=options.n, **facts)


def _operation(prompt: Prompt) -> str:
    """As OpenTelemetry's conventions name it."""
    return "chat" if isinstance(prompt, ChatPrompt) else "text_completion"


async def _wait_account(answer: Answer) -> None:
    """For the scheduler's account of an answer that is over, and not for ever."""
    try:
        async with asyncio.timeout(_patience(answer)):
            await answer.wait()
    except TimeoutError:
        answer.give_up_account()


def _patience(answer: Answer) -> float:
    if answer.refusal is None:
        return ACK_TIMEOUT_S
    return DRAIN_ACK_TIMEOUT_S if answer.refusal is REFUSAL_OF[AbortCause.DRAIN] else ABORT_ACK_TIMEOUT_S


def _at_deadline(options: GenerateOptions, elapsed_ns: int, answer: Answer) -> asyncio.TimerHandle | None:
    """Ends the answer when its time is up. One timer per request: one per wait would cost as much as the wait."""
    if options.deadline_ns is None:
        return None
    left_s = (options.deadline_ns - elapsed_ns) / NS_PER_S
    return asyncio.get_running_loop().call_later(left_s, answer.abort, AbortCause.DEADLINE)


def _accepted(answer: Answer, options: GenerateOptions) -> Accepted:
    return Accepted(
        request_id=options.request_id,
        prompt_tokens=answer.usage.prompt_tokens,
        seed=options.sampling.seed,
        prompt_ids=answer.prompt_ids,
        prompt_logprobs=answer.prompt_logprobs or (),
    )


def _ms(value_ns: Any) -> Any:
    if isinstance(value_ns, dict):
        return {reason: _ms(waited_ns) for reason, waited_ns in value_ns.items()}
    return round(value_ns / NS_PER_MS, 3)


def _time_left(options: GenerateOptions, elapsed_ns: int) -> int:
    """Nanoseconds until the deadline, at least 1; 0 without one."""
    return 0 if options.deadline_ns is None else max(1, options.deadline_ns - elapsed_ns)
