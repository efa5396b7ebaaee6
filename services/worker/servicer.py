"""Execution.Execute: one stream per scheduler, fenced by its epoch. Computes nothing itself."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from llguidance import LLMatcher

from services.worker import wire
from services.worker.execute.device_thread import DeviceThread, InboxFullError
from services.worker.grammars import GrammarCompiler
from services.worker.plan import StepPlan, StepResult
from shared.clock import monotonic_ns
from shared.ids import new_error_id
from shared.outcome import RefusedError, refuse
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import execution_pb2_grpc
from shared.structured import Structured
from shared.text.grammar import GrammarError

log = structlog.get_logger("servicer")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Execution"].full_name
BEGIN_TIMEOUT_S = 5.0

OnResult = Callable[[StepPlan, StepResult], None]
Outcome = StepResult | tuple[int, str] | Exception | None
"""What a stream's outbox holds: a result, a grammar's id and what is wrong with it, the error that ends the stream, or
None for an orderly end."""


class _Stream:
    """One Execute call: the results on their way up, and the grammars that its plans may name. Lives on the event
    loop."""

    __slots__ = ("_half_closed", "_outstanding", "_preparing", "_results", "epoch", "grammars")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.grammars: dict[int, LLMatcher | None] = {}
        """By id; None while one is compiled."""
        self._preparing: set[asyncio.Task[None]] = set()
        self._results: asyncio.Queue[Outcome] = asyncio.Queue()  # bounded by the device thread's pending plans
        self._outstanding = 0
        self._half_closed = False

    def expect(self) -> None:
        self._outstanding += 1

    def deliver(self, result: StepResult) -> None:
        self._outstanding -= 1
        self._results.put_nowait(result)
        self._end_if_drained()

    def prepare(self, grammar_id: int, structured: Structured, compiler: GrammarCompiler) -> None:
        """Compiles it, and says so."""
        self.grammars[grammar_id] = None
        task = asyncio.create_task(self._prepare(grammar_id, structured, compiler), name="prepare")
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _prepare(self, grammar_id: int, structured: Structured, compiler: GrammarCompiler) -> None:
        error = ""
        try:
            matcher = await compiler.compile(structured)
            if grammar_id in self.grammars:  # else it was forgotten meanwhile
                self.grammars[grammar_id] = matcher
        except GrammarError as refused:
            error = str(refused)
        except Exception as failure:
            error_id = new_error_id()
            log.error("grammar_failed", error_id=error_id, exc_info=failure)
            error = f"internal error {error_id}; the worker's log has it"
        self._results.put_nowait((grammar_id, error))

    def half_close(self) -> None:
        """No more plans will come: the stream ends behind the last result."""
        self._half_closed = True
        self._end_if_drained()

    def fail(self, error: Exception) -> None:
        self._results.put_nowait(error)

    async def next(self) -> Outcome:
        return await self._results.get()

    def _end_if_drained(self) -> None:
        if self._half_closed and self._outstanding == 0:
            self._results.put_nowait(None)


class ExecutionServicer(execution_pb2_grpc.ExecutionServicer):
    """Serves one scheduler at a time: the one with the newest epoch. Each epoch begins once."""

    def __init__(self) -> None:
        self.on_stream_end: Callable[[], None] = lambda: None
        """Called when the scheduler's stream is gone and no other has taken its place."""
        self.on_result: OnResult = lambda plan, result: None
        """Called with every result, after it is on its way up."""
        self._compiler = GrammarCompiler(None)
        self._device: DeviceThread | None = None
        self._epoch = 0
        self._stream: _Stream | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        execution_pb2_grpc.add_ExecutionServicer_to_server(self, server)

    def attach(self, device: DeviceThread, compiler: GrammarCompiler | None = None) -> None:
        """From here on streams are accepted."""
        self._device = device
        self._compiler = compiler or self._compiler

    def close(self) -> None:
        """Ends the stream, behind the results that are already on their way up."""
        self._device = None
        self._compiler.close()
        if self._stream is not None:
            self._stream.fail(refuse("worker_lost", "this worker is stopping"))

    async def Execute(
        self, request_iterator: AsyncIterator[pb.ExecuteRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ExecuteReply]:
        begin = await _first_message(request_iterator)
        stream = self._open(begin.epoch)
        device = self._device
        assert device is not None
        try:
            await device.begin(stream.epoch)
            log.info("epoch_begun", epoch=stream.epoch, scheduler=begin.scheduler)
            yield wire.ready_reply(stream.epoch)
            async with _reading(request_iterator, stream, device, self._compiler, self.on_result):
                while (outcome := await stream.next()) is not None:
                    if isinstance(outcome, Exception):
                        raise outcome
                    prepared = isinstance(outcome, tuple)
                    yield wire.prepared_reply(*outcome) if prepared else wire.result_to_reply(outcome)
        finally:
            if self._stream is stream:
                self._stream = None
                self.on_stream_end()

    def _open(self, epoch: int) -> _Stream:
        """Fences: ends the stream of an older epoch, refuses an epoch that is not newer."""
        if self._device is None:
            raise refuse("no_worker", "this worker is still loading its model")
        if epoch <= self._epoch:
            raise refuse("unsupported", f"epoch {epoch} is not newer than {self._epoch}, the last one begun here")
        if self._stream is not None:
            self._stream.fail(refuse("unsupported", f"epoch {self._stream.epoch} gave way to epoch {epoch}"))
        self._epoch = epoch
        self._stream = _Stream(epoch)
        return self._stream


def _deliver(stream: _Stream, on_result: OnResult, plan: StepPlan, result: StepResult) -> None:
    stream.deliver(result)
    on_result(plan, result)


async def _first_message(requests: AsyncIterator[pb.ExecuteRequest]) -> pb.ExecuteBegin:
    try:
        message = await asyncio.wait_for(anext(aiter(requests)), BEGIN_TIMEOUT_S)
    except (StopAsyncIteration, TimeoutError):
        raise refuse("invalid_argument", "the stream must begin with ExecuteBegin") from None
    if message.WhichOneof("message") != "begin":
        raise refuse("invalid_argument", "the stream must begin with ExecuteBegin")
    return message.begin


@contextlib.asynccontextmanager
async def _reading(
    requests: AsyncIterator[pb.ExecuteRequest],
    stream: _Stream,
    device: DeviceThread,
    compiler: GrammarCompiler,
    on_result: OnResult,
) -> AsyncIterator[None]:
    reader = asyncio.create_task(_read(requests, stream, device, compiler, on_result))
    try:
        yield
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(
    requests: AsyncIterator[pb.ExecuteRequest],
    stream: _Stream,
    device: DeviceThread,
    compiler: GrammarCompiler,
    on_result: OnResult,
) -> None:
    try:
        async for message in requests:
            match message.WhichOneof("message"):
                case "plan":
                    _take_plan(message.plan, stream, device, on_result)
                case "prepare":
                    stream.prepare(message.prepare.id, Structured.of(message.prepare.grammar), compiler)
                case "forget":
                    stream.grammars.pop(message.forget.id, None)
                case _:
                    raise refuse("invalid_argument", "only plans and grammars may follow ExecuteBegin")
    except wire.WireError as error:
        stream.fail(refuse("invalid_argument", str(error)))
    except InboxFullError as error:
        stream.fail(refuse("queue_full", str(error)))
    except RefusedError as error:
        stream.fail(error)
    except Exception as error:
        stream.fail(error)
    else:
        stream.half_close()


def _take_plan(message: pb.StepPlan, stream: _Stream, device: DeviceThread, on_result: OnResult) -> None:
    arrived_ns = monotonic_ns()
    plan = wire.plan_from_message(message, stream.grammars)
    deliver = functools.partial(_deliver, stream, on_result, plan)
    device.submit(plan, epoch=stream.epoch, arrived_ns=arrived_ns, deliver=deliver)
    stream.expect()
