"""The scheduler's gRPC door: links from routers, registrations of workers, control."""

import asyncio
from array import array
from collections.abc import AsyncIterator

import grpc
import structlog

from services.scheduler import wire
from services.scheduler.loop import Loop
from services.scheduler.publish import Publisher, RouterLink
from services.scheduler.workers import Workers
from shared import PROTOCOL_VERSION, __version__
from shared.clock import NS_PER_MS, NowNs
from shared.outcome import refuse
from shared.rpc.sluice.v1 import (
    control_pb2,
    control_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
    scheduling_pb2,
    scheduling_pb2_grpc,
)

log = structlog.get_logger("servicer")

HELLO_TIMEOUT_S = 5.0
Context = grpc.aio.ServicerContext


class SchedulingServicer(scheduling_pb2_grpc.SchedulingServicer):
    """One Link per router."""

    def __init__(self, loop: Loop, publisher: Publisher, now_ns: NowNs) -> None:
        self._loop = loop
        self._publisher = publisher
        self._now_ns = now_ns

    def add_to(self, server: grpc.aio.Server) -> None:
        scheduling_pb2_grpc.add_SchedulingServicer_to_server(self, server)

    async def Link(
        self, request_iterator: AsyncIterator[scheduling_pb2.RouterFrame], context: Context
    ) -> AsyncIterator[scheduling_pb2.SchedulerFrame]:
        incoming = aiter(request_iterator)
        router = await self._hello(incoming)
        link = self._publisher.open(router)
        log.info("router_linked", router=router, link=link.number)
        reader = asyncio.create_task(self._read(incoming, link), name=f"link {router}")
        try:
            async for frame in link.frames(self._now_ns):
                yield frame
            if reader.done() and not reader.cancelled() and (error := reader.exception()):
                raise error
        finally:
            reader.cancel()
            self._loop.abort_link(link)
            log.info("router_unlinked", router=router, link=link.number)

    async def _hello(self, incoming: AsyncIterator[scheduling_pb2.RouterFrame]) -> str:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                frame = await anext(incoming, None)
        except TimeoutError:
            frame = None
        if frame is None or not frame.HasField("hello"):
            raise refuse("invalid_argument", "a link begins with hello")
        if frame.hello.protocol_version != PROTOCOL_VERSION:
            raise refuse(
                "unsupported",
                f"the router speaks protocol {frame.hello.protocol_version}, this scheduler {PROTOCOL_VERSION}: "
                "run the same version of Sluice everywhere",
            )
        return frame.hello.router

    async def _read(self, incoming: AsyncIterator[scheduling_pb2.RouterFrame], link: RouterLink) -> None:
        """Commands until the router half-closes; then the link ends. None any more of one that was let go: nobody would
        hear of what they ask for."""
        parts: dict[int, tuple[scheduling_pb2.Submit, array]] = {}
        try:
            async for frame in incoming:
                if link.closed:
                    return
                for submit in frame.submits:
                    self._submit(submit, link, parts)
                for abort in frame.aborts:
                    parts.pop(abort.key, None)
                    self._loop.abort(link.number, abort.key, abort.index, wire.cause_of(abort))
        finally:
            link.close()

    def _submit(
        self,
        submit: scheduling_pb2.Submit,
        link: RouterLink,
        parts: dict[int, tuple[scheduling_pb2.Submit, array]],
    ) -> None:
        first, token_ids = parts.pop(submit.key, (submit, array("I")))
        token_ids.extend(wire.unpack_u32(submit.token_ids))
        if submit.more:
            parts[submit.key] = (first, token_ids)
        else:
            self._loop.submit(wire.submission_of(first, token_ids, link.number, self._now_ns()))


class RegistryServicer(execution_pb2_grpc.RegistryServicer):
    """Workers come here."""

    def __init__(self, workers: Workers, loop: Loop) -> None:
        self._workers = workers
        self._loop = loop

    def add_to(self, server: grpc.aio.Server) -> None:
        execution_pb2_grpc.add_RegistryServicer_to_server(self, server)

    async def Register(
        self, request: execution_pb2.RegisterRequest, context: Context
    ) -> execution_pb2.RegisterResponse:
        if self._loop.draining:
            raise refuse("draining", "the scheduler is shutting down", retry_after_ms=1000)
        return self._workers.register(request)

    async def Renew(self, request: execution_pb2.RenewRequest, context: Context) -> execution_pb2.RenewResponse:
        if not self._workers.renew(request):
            raise refuse("lease_not_found", "no such lease; register again")
        return execution_pb2.RenewResponse()


class ControlServicer(control_pb2_grpc.ControlServicer):
    """What runs here, and how to stop it gently."""

    def __init__(self, loop: Loop, *, instance: str, now_ns: NowNs, drain: asyncio.Queue[float | None]) -> None:
        self._loop = loop
        self._instance = instance
        self._now_ns = now_ns
        self._started_ns = now_ns()
        self._drain = drain

    def add_to(self, server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_ControlServicer_to_server(self, server)

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        return control_pb2.GetServerInfoResponse(
            service="scheduler",
            version=__version__,
            instance=self._instance,
            uptime_ms=(self._now_ns() - self._started_ns) // NS_PER_MS,
            draining=self._loop.draining,
        )

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: Context) -> control_pb2.GetLoadResponse:
        return control_pb2.GetLoadResponse(
            groups=map(wire.public_load, self._loop.loads()), requests_in_flight=self._loop.num_requests
        )

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        self._drain.put_nowait(request.timeout_ms / 1000 if request.timeout_ms else None)
        return control_pb2.DrainResponse(requests_in_flight=self._loop.num_requests)
