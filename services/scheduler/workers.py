"""Links to workers: registration under a lease, one Execute stream each, and the ways in which one is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import structlog

from services.scheduler import wire
from services.scheduler.core.grammars import Forget, Prepare
from services.scheduler.core.plan import StepPlan, StepResult
from services.scheduler.core.worker_group import GroupSpec
from shared import PROTOCOL_VERSION
from shared.clock import NS_PER_MS, NS_PER_S, NowNs
from shared.net.channel import internal_metadata, open_internal_channel
from shared.outcome import refuse
from shared.rpc.sluice.v1 import execution_pb2, execution_pb2_grpc

log = structlog.get_logger("workers")

READY_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class Worker:
    """One registered worker process and the stream to it."""

    lease: int
    request: execution_pb2.RegisterRequest
    expires_ns: int
    spec: GroupSpec
    progress: int = 0
    progress_ns: int = 0
    """When `progress` last moved, or a plan was sent to an idle worker."""
    heard_ns: int = 0
    """When it last renewed its lease or answered a plan."""
    in_flight: int = 0
    begin_again: bool = False
    """A step failed: the stream is to be opened again, under a newer epoch."""
    outbox: asyncio.Queue[execution_pb2.ExecuteRequest] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.request.worker


@dataclass(slots=True)
class WorkerEvents:
    """What the loop wants to hear."""

    ready: Callable[[GroupSpec], None]
    result: Callable[[str, StepResult], None]
    lost: Callable[[str, str], None]
    prepared: Callable[[str, int, str], None] = lambda group, grammar_id, error: None


class Workers:
    """Owns leases and Execute streams. A worker that was lost registers again as a new one."""

    def __init__(self, *, scheduler: str, token: str, ttl_ms: int, stuck_ms: int, epoch: int, now_ns: NowNs) -> None:
        self._scheduler = scheduler
        self._metadata = internal_metadata(token)
        self._ttl_ms = ttl_ms
        self._stuck_ns = stuck_ms * NS_PER_MS
        self._epoch = epoch
        self._now_ns = now_ns
        self._workers: dict[str, Worker] = {}
        self._next_lease = 1
        self.events: WorkerEvents | None = None

    @property
    def identity(self) -> execution_pb2.RegisterRequest | None:
        """What the registered workers agree on; None without any."""
        return next((worker.request for worker in self._workers.values()), None)

    def heard_ns(self) -> dict[str, int]:
        """When each worker was last heard of. Any thread may ask."""
        return {worker.id: worker.heard_ns for worker in list(self._workers.values())}

    # The registry's side.

    def register(self, request: execution_pb2.RegisterRequest) -> execution_pb2.RegisterResponse:
        """Takes a worker in and begins to connect to it. Raises RefusedError, by name, for one that does not match."""
        for other in list(self._workers.values()):
            if other.request.address == request.address:
                self._lose(other, "another process registered at its address")
        self._require_match(request)
        now_ns = self._now_ns()
        worker = Worker(self._next_lease, request, now_ns + self._ttl_ms * NS_PER_MS, wire.group_spec_of(request))
        worker.progress_ns = worker.heard_ns = now_ns
        self._next_lease += 1
        self._workers[worker.id] = worker
        worker.task = asyncio.create_task(self._serve(worker), name=f"execute {worker.id}")
        log.info("worker_registered", worker=worker.id, address=request.address, num_blocks=request.num_blocks)
        return execution_pb2.RegisterResponse(lease=worker.lease, ttl_ms=self._ttl_ms)

    def renew(self, request: execution_pb2.RenewRequest) -> bool:
        """Extends a lease; False for one that is unknown or over."""
        for worker in self._workers.values():
            if worker.lease == request.lease:
                worker.heard_ns = self._now_ns()
                worker.expires_ns = worker.heard_ns + self._ttl_ms * NS_PER_MS
                if request.progress != worker.progress:
                    worker.progress, worker.progress_ns = request.progress, self._now_ns()
                return True
        return False

    # The loop's side.

    def send(self, group: str, plan: StepPlan) -> None:
        """Hands a plan over to the stream's writer."""
        worker = self._workers[group]
        if worker.in_flight == 0:
            worker.progress_ns = self._now_ns()
        worker.in_flight += 1
        worker.outbox.put_nowait(wire.plan_message(plan))

    def tell(self, group: str, command: Prepare | Forget) -> None:
        """Hands over what the worker is to do with a grammar, in order with the plans."""
        self._workers[group].outbox.put_nowait(wire.grammar_message(command))

    def begin_again(self, group: str) -> None:
        """A step failed, and its result is being absorbed: a new stream with a newer epoch makes the worker drop its
        slots and take plans again. Plans handed over from now on go there."""
        worker = self._workers[group]
        worker.in_flight = 0
        worker.outbox = asyncio.Queue()
        worker.begin_again = True

    def give_up(self, group: str, reason: str) -> None:
        """Lets go of a worker; it registers again as a new one."""
        if group in self._workers:
            self._lose(self._workers[group], reason)

    def watch(self) -> None:
        """Gives up workers whose lease ran out or whose step makes no progress. Called a few times a second."""
        now_ns = self._now_ns()
        for worker in list(self._workers.values()):
            if now_ns > worker.expires_ns:
                self._lose(worker, "its lease ran out")
            elif worker.in_flight and now_ns > worker.progress_ns + self._stuck_ns:
                self._lose(worker, f"no progress for {self._stuck_ns / NS_PER_S:g} s")

    async def close(self) -> None:
        tasks = [worker.task for worker in self._workers.values() if worker.task]
        self._workers.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside.

    def _require_match(self, request: execution_pb2.RegisterRequest) -> None:
        if request.protocol_version != PROTOCOL_VERSION:
            raise refuse(
                "unsupported",
                f"the worker speaks protocol {request.protocol_version}, this scheduler {PROTOCOL_VERSION}: "
                "run the same version of Sluice everywhere",
            )
        if not (request.num_blocks and request.block_size and request.max_num_seqs and request.max_num_batched_tokens):
            raise refuse("unsupported", "the worker registered without blocks, slots or a token budget")
        first = self.identity
        for field_name in ("model_fingerprint", "dtype", "block_size", "vocab_size"):
            if first and getattr(first, field_name) != getattr(request, field_name):
                raise refuse(
                    "unsupported",
                    f"the worker's {field_name} is {getattr(request, field_name)}, that of the workers already here "
                    f"is {getattr(first, field_name)}: all workers of a scheduler must agree",
                )

    def _begin(self) -> execution_pb2.ExecuteRequest:
        self._epoch += 1
        return execution_pb2.ExecuteRequest(
            begin=execution_pb2.ExecuteBegin(epoch=self._epoch, scheduler=self._scheduler)
        )

    async def _serve(self, worker: Worker) -> None:
        """A worker's streams, one epoch each, until it is lost."""
        reason = "its stream ended"
        channel = open_internal_channel(worker.request.address)
        try:
            while await self._run_epoch(worker, execution_pb2_grpc.ExecutionStub(channel)):
                pass
        except TimeoutError:
            reason = f"it did not answer at {worker.request.address} within {READY_TIMEOUT_S:.0f} s"
        except grpc.aio.AioRpcError as error:
            reason = f"its stream broke ({error.code().name}: {error.details()})"
        except Exception as error:
            reason = "this scheduler failed"
            log.error("worker_link_failed", worker=worker.id, exc_info=error)
        finally:
            self._lose(worker, reason)
            await asyncio.shield(channel.close())

    async def _run_epoch(self, worker: Worker, stub: execution_pb2_grpc.ExecutionStub) -> bool:
        """One stream. True when the next epoch is to begin, False when the worker ended it."""
        again = worker.begin_again
        worker.begin_again = False
        call = stub.Execute(self._outgoing(worker), metadata=self._metadata)
        try:
            replies = aiter(call)
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await anext(replies)
            except grpc.aio.AioRpcError as error:
                if again or not self._catch_up(worker, error):
                    raise
                return True
            assert self.events is not None
            if not again:
                self.events.ready(worker.spec)
            async for reply in replies:
                kind = reply.WhichOneof("message")
                if kind == "result":
                    self._on_result(worker, wire.result_of(reply.result))
                elif kind == "prepared":
                    self.events.prepared(worker.id, reply.prepared.id, reply.prepared.error)
                if worker.begin_again:
                    return True
            return False
        except StopAsyncIteration:
            return False
        finally:
            call.cancel()

    def _catch_up(self, worker: Worker, error: grpc.aio.AioRpcError) -> bool:
        """Whether a worker that has just registered refused an epoch that is not newer than its last: another
        scheduler began that one, before a restart with the clock set back. It came to this one, so what it says is
        taken over, and the next epoch is newer. One that refuses later follows another scheduler, and is let go."""
        newest = wire.newest_epoch(error.details() or "")
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION or not newest:
            return False
        log.warning("epoch_caught_up", worker=worker.id, epoch=self._epoch, newest=newest)
        self._epoch = max(self._epoch, newest)
        worker.outbox = asyncio.Queue()  # the refused stream may still take a plan out of the old one
        return True

    async def _outgoing(self, worker: Worker) -> AsyncIterator[execution_pb2.ExecuteRequest]:
        outbox = worker.outbox
        yield self._begin()
        while True:
            yield await outbox.get()

    def _on_result(self, worker: Worker, result: StepResult) -> None:
        worker.in_flight -= 1
        worker.progress_ns = worker.heard_ns = self._now_ns()
        if result.error:
            log.error("step_failed", worker=worker.id, step=result.step, error=result.error)
        assert self.events is not None
        self.events.result(worker.id, result)

    def _lose(self, worker: Worker, reason: str) -> None:
        if self._workers.get(worker.id) is not worker:
            return
        del self._workers[worker.id]
        log.warning("worker_lost", worker=worker.id, reason=reason)
        if worker.task and worker.task is not asyncio.current_task():
            worker.task.cancel()
        if self.events:
            self.events.lost(worker.id, reason)
