"""One request for a completion from its body to its last byte: read, understood, answered, or ended with an error.

Nothing is written before the first token: what fails until then has a status of its own. What fails later is an event
in the stream, which then ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import structlog
from starlette.types import Message, Receive, Scope, Send

from services.router.admission import Admission
from services.router.http.door import hang_up
from services.router.http.errors import Problem, problem, problem_of
from services.router.http.guard import header, key_of
from services.router.http.requests import Question, Source, decode, ignored_fields
from services.router.http.responses import Telling, event_of
from services.router.limits import is_request_id
from services.router.rejections import Rejections
from services.router.request import Event
from services.router.session import Session
from shared.ids import new_error_id
from shared.outcome import AbortCause, RefusedError, refuse
from shared.telemetry import context as trace_context

log = structlog.get_logger("http")

READ_TIMEOUT_S = 30.0
"""For a body to arrive."""
REQUEST_ID = "x-request-id"
JSON_HEADERS = [("content-type", "application/json")]
STREAM_HEADERS = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]
CHAT_PARAMS = {"response.logprobs": "top_logprobs", "response.prompt_logprobs": "prompt_logprobs"}
COMPLETION_PARAMS = {"response.logprobs": "logprobs", "response.prompt_logprobs": "prompt_logprobs"}

IGNORED = "x-ignored-fields"
"""Names the fields of a body that this server does not know."""
Understand = Callable[[Any, Source], Question]


class ClientGoneError(Exception):
    """Nobody is there to be answered."""


class Answering:
    """What every completion needs. One object serves them all."""

    def __init__(
        self,
        *,
        session: Session,
        admission: Admission,
        rejections: Rejections,
        max_request_bytes: int,
        stall_timeout_ms: int,
    ) -> None:
        self.session = session
        self.admission = admission
        self.rejections = rejections
        self.max_request_bytes = max_request_bytes
        self.stall_timeout_s = stall_timeout_ms / 1000


class Completions:
    """An ASGI application: one endpoint. `understand` makes a Question of a body, which is a `kind`; `tell` says how it
    is answered."""

    def __init__(
        self,
        answering: Answering,
        kind: type[msgspec.Struct],
        understand: Understand,
        tell: Callable[[Question], Telling],
    ) -> None:
        self._answering = answering
        self._kind = kind
        self._understand = understand
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(scope, receive, send, self._answering)
        try:
            question = await self._read(scope, receive, reply)
            await _while_connected(self._answer(question, reply), receive)
        except RefusedError as error:
            await reply.fail(problem_of(error.refusal, reply.params))
        except ClientGoneError:
            pass
        except Exception as error:
            await reply.fail(internal(scope, error))

    async def _read(self, scope: Scope, receive: Receive, reply: "_Reply") -> Question:
        """What is asked for. A refusal is counted here: the session never hears of it."""
        try:
            require_json(scope)
            body = await read_body(scope, receive, self._answering.max_request_bytes)
            asked = decode(body, self._kind)
            reply.ignored = ignored_fields(body, self._kind)
            question = self._understand(asked, _source(scope))
            self._answering.admission.require_possible(len(question.prompts), question.options[0].key)
        except RefusedError as error:
            self._answering.rejections.reject(error.refusal, request_id=reply.request_id, door="http")
            raise
        reply.question, reply.request_id = question, question.request_id
        return question

    async def _answer(self, question: Question, reply: "_Reply") -> None:
        telling = self._tell(question)
        if question.stream:

            async def take(at: int, event: Event) -> None:
                chunk = telling.chunks(at, event)
                if chunk:
                    await reply.write(chunk)

            await _run(self._answering.session, question, take)
            await reply.end(telling.last_chunk())
        else:

            async def keep(at: int, event: Event) -> None:
                telling.take(at, event)

            await _run(self._answering.session, question, keep)
            await reply.whole(200, telling.body(), JSON_HEADERS)


async def _run(session: Session, question: Question, take: Callable[[int, Event], Awaitable[None]]) -> None:
    """Runs a request for each prompt and hands over what comes. The first refusal ends them all."""

    async def one(at: int) -> None:
        async with aclosing(session.run(question.prompts[at], question.options[at])) as events:
            async for event in events:
                await take(at, event)

    if len(question.prompts) == 1:
        return await one(0)
    try:
        async with asyncio.TaskGroup() as group:
            for at in range(len(question.prompts)):
                group.create_task(one(at))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Does the work, and drops it as soon as the client is gone. Raises ClientGoneError, or what the work raises."""
    working = asyncio.create_task(work, name="answer")
    leaving = asyncio.create_task(_disconnected(receive), name="disconnect")
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(scope: Scope, receive: Receive, max_request_bytes: int) -> bytes:
    """The whole body. Raises RefusedError for one that is too large or does not arrive, ClientGoneError."""
    max_bytes = key_of(scope).largest(max_request_bytes)
    too_large = refuse("message_too_large", f"the request exceeds {max_bytes} bytes (--max-request-bytes)")
    declared = header(scope, "content-length")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message["body"])
                size += len(parts[-1])
                more = message["more_body"]
                if size > max_bytes:
                    raise too_large
    except TimeoutError:
        raise refuse("invalid_argument", f"the body did not arrive within {READ_TIMEOUT_S:g} s") from None
    return b"".join(parts)


def require_json(scope: Scope) -> None:
    """A web page of another origin can send any body but one that says that it is JSON. Raises RefusedError."""
    kind = header(scope, "content-type").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refuse("invalid_argument", "content-type: application/json is needed", field="content-type")


def internal(scope: Scope, error: Exception) -> Problem:
    """The answer to a failure of ours: an id that the log also carries, never the exception's text."""
    error_id = new_error_id()
    log.error("handler_failed", path=scope["path"], error_id=error_id, exc_info=error)
    return problem(500, f"internal error {error_id}; the server's log has it", code="internal")


def _source(scope: Scope) -> Source:
    caller = trace_context.parse(header(scope, trace_context.PARENT), header(scope, trace_context.STATE))
    return Source(request_id=header(scope, REQUEST_ID), caller=caller, key=key_of(scope))


class _Reply:
    """The writing half of one call: a whole body, or a stream that begins with its first chunk."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, answering: Answering) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._answering = answering
        self._begun = False
        self._stalled = False
        self.question: Question | None = None
        self.ignored: Sequence[str] = ()
        sent = header(scope, REQUEST_ID)
        self.request_id = sent if is_request_id(sent) else ""

    @property
    def params(self) -> dict[str, str]:
        """What this endpoint calls some of the fields, and this request of it."""
        names = CHAT_PARAMS if self._scope["path"].startswith("/v1/chat") else COMPLETION_PARAMS
        return {**names, **self.question.params} if self.question else names

    async def write(self, chunk: bytes) -> None:
        """One more piece of a stream. Raises RefusedError where the client does not read."""
        if not self._begun:
            self._begun = True
            await self._start(200, STREAM_HEADERS)
        await self._body(chunk, more=True)

    async def end(self, chunk: bytes) -> None:
        await self.write(chunk)
        await self._body(b"", more=False)

    async def whole(self, status: int, body: bytes, headers: Sequence[tuple[str, str]]) -> None:
        self._begun = True
        await self._start(status, [*headers, ("content-length", str(len(body)))])
        await self._body(body, more=False)

    async def fail(self, failure: Problem) -> None:
        """An answer of its own, or the last event of a stream. One who does not read is hung up on."""
        if self._stalled:
            hang_up(self._scope)
            await _disconnected(self._receive)
        elif self._begun:
            await self.end(event_of(failure.body))
        else:
            await self.whole(failure.status, failure.body, [*JSON_HEADERS, *failure.headers])

    async def _start(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        if self.request_id:
            raw.append((REQUEST_ID.encode(), self.request_id.encode()))
        if self.ignored:
            raw.append((IGNORED.encode(), ", ".join(self.ignored).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, body: bytes, *, more: bool) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": more}
        try:
            async with asyncio.timeout(self._answering.stall_timeout_s):
                await self._send(message)
        except TimeoutError:
            self._stalled = True
            for options in self.question.options if self.question else ():
                self._answering.admission.abort(options.request_id, AbortCause.STALLED, options.key)
            seconds = f"{self._answering.stall_timeout_s:g} s"
            raise refuse("client_stalled", f"the client read nothing for {seconds}; the answer was ended") from None
