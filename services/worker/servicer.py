"""Execution.Execute: one stream per scheduler, fenced by its epoch. Computes nothing itself."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from services.worker import wire
from services.worker.execute.device_thread import DeviceThread, InboxFullError
from services.worker.plan import StepPlan, StepResult
from shared.clock import monotonic_ns
from shared.outcome import RefusedError, refuse
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import execution_pb2_grpc

log = structlog.get_logger("servicer")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Execution"].full_name
BEGIN_TIMEOUT_S = 5.0

OnResult = Callable[[StepPlan, StepResult], None]
Outcome = StepResult | Exception | None
"""What a stream's outbox holds: a result, the error that ends it, or None for an orderly end."""


class _Stream:
    """One Execute call: the results on their way up. Lives on the event loop."""

    __slots__ = ("_half_closed", "_outstanding", "_results", "epoch")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._results: asyncio.Queue[Outcome] = asyncio.Queue()  # bounded by the device thread's pending plans
        self._outstanding = 0
        self._half_closed = False

    def expect(self) -> None:
        self._outstanding += 1

    def deliver(self, result: StepResult) -> None:
        self._outstanding -= 1
        self._results.put_nowait(result)
        self._end_if_drained()

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
        self._device: DeviceThread | None = None
        self._epoch = 0
        self._stream: _Stream | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        execution_pb2_grpc.add_ExecutionServicer_to_server(self, server)

    def attach(self, device: DeviceThread) -> None:
        """From here on streams are accepted."""
        self._device = device

    def close(self) -> None:
        """Ends the stream, behind the results that are already on their way up."""
        self._device = None
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
            async with _reading(request_iterator, stream, device, self.on_result):
                while (outcome := await stream.next()) is not None:
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield wire.result_to_reply(outcome)
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
    requests: AsyncIterator[pb.ExecuteRequest], stream: _Stream, device: DeviceThread, on_result: OnResult
) -> AsyncIterator[None]:
    reader = asyncio.create_task(_read_plans(requests, stream, device, on_result))
    try:
        yield
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read_plans(
    requests: AsyncIterator[pb.ExecuteRequest], stream: _Stream, device: DeviceThread, on_result: OnResult
) -> None:
    try:
        async for message in requests:
            arrived_ns = monotonic_ns()
            if message.WhichOneof("message") != "plan":
                raise refuse("invalid_argument", "only plans may follow ExecuteBegin")
            plan = wire.plan_from_message(message.plan)
            deliver = functools.partial(_deliver, stream, on_result, plan)
            device.submit(plan, epoch=stream.epoch, arrived_ns=arrived_ns, deliver=deliver)
            stream.expect()
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
