"""The other processes of this router (`--router-processes`): what one of them knows, all of them can say.

They share the ports, so that a client reaches any of them; each has its own admission, links and traces. Whatever is
asked about the whole router goes to the others too, over Unix sockets in a folder that only their user can enter. A
process that does not answer is being restarted and has nothing to tell.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
import structlog

from services.router import wire
from services.router.admission import Admission
from services.router.gate import Key
from services.router.traces import Traces
from shared.net.server import create_server
from shared.outcome import AbortCause
from shared.rpc.sluice.v1 import control_pb2, peers_pb2
from shared.rpc.sluice.v1.peers_pb2_grpc import PeersServicer, PeersStub, add_PeersServicer_to_server
from shared.telemetry.exposition import Exposition

log = structlog.get_logger("peers")

ANSWER_TIMEOUT_S = 2.0
MAX_MESSAGE_BYTES = 64 * 2**20
"""Of 256 traces there may be a few megabytes."""


class PeerPlace(msgspec.Struct, frozen=True):
    """Which of how many processes this one is, and the folder of their sockets."""

    folder: str
    index: int
    count: int

    def address(self, index: int) -> str:
        return f"unix:{Path(self.folder) / f'{index}.sock'}"


class Peers:
    """The others. With one process there are none, and every answer is at once."""

    def __init__(self, place: PeerPlace | None) -> None:
        self._place = place
        self._server: grpc.aio.Server | None = None
        self._channels: list[grpc.aio.Channel] = []

    async def open(self, own: "OwnAnswers") -> None:
        """Answers the others from now on, and can ask them."""
        if self._place is None:
            return
        self._server = create_server(max_receive_bytes=MAX_MESSAGE_BYTES)
        add_PeersServicer_to_server(own, self._server)
        self._server.add_insecure_port(self._place.address(self._place.index))
        await self._server.start()
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        others = (index for index in range(self._place.count) if index != self._place.index)
        self._channels = [grpc.aio.insecure_channel(self._place.address(index), options) for index in others]

    async def close(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
        for channel in self._channels:
            await channel.close()

    async def abort(self, request_id: str, tenant: str) -> bool:
        """Whether one of the others had such a request of the tenant's, which it ended."""
        request = peers_pb2.PeerAbortRequest(request_id=request_id, tenant=tenant)
        return any(answer.found for answer in await self._ask(lambda stub: stub.Abort, request))

    async def requests_in_flight(self) -> int:
        answers = await self._ask(lambda stub: stub.CountRequests, peers_pb2.PeerCountRequest())
        return sum(answer.requests_in_flight for answer in answers)

    async def traces(self, limit: int, request_id: str) -> list[control_pb2.Trace]:
        request = control_pb2.ListTracesRequest(limit=limit, request_id=request_id)
        return [trace for answer in await self._ask(lambda stub: stub.ListTraces, request) for trace in answer.traces]

    async def drain(self, timeout_ms: int) -> int:
        """Has the others drain too; returns how many requests they hold."""
        answers = await self._ask(lambda stub: stub.Drain, control_pb2.DrainRequest(timeout_ms=timeout_ms))
        return sum(answer.requests_in_flight for answer in answers)

    async def snapshots(self) -> list[bytes]:
        """What the others export, see Exposition.merged_with."""
        answers = await self._ask(lambda stub: stub.ReadMetrics, peers_pb2.PeerMetricsRequest())
        return [answer.snapshot for answer in answers]

    async def _ask(self, method: Callable[[Any], Callable[..., Awaitable[Any]]], request: Any) -> Sequence[Any]:
        calls = [method(PeersStub(channel))(request, timeout=ANSWER_TIMEOUT_S) for channel in self._channels]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, grpc.aio.AioRpcError):
                log.info("peer_silent", reason=answer.code().name)
            elif isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class OwnAnswers(PeersServicer):
    """What the others are told: of this process alone."""

    def __init__(
        self,
        *,
        admission: Admission,
        traces: Traces,
        exposition: Exposition,
        drain: Callable[[float | None], Awaitable[None]],
    ) -> None:
        self._admission = admission
        self._traces = traces
        self._exposition = exposition
        self._drain = drain

    async def Abort(
        self, request: peers_pb2.PeerAbortRequest, context: grpc.aio.ServicerContext
    ) -> peers_pb2.PeerAbortResponse:
        found = self._admission.abort(request.request_id, AbortCause.CLIENT, Key(tenant=request.tenant))
        return peers_pb2.PeerAbortResponse(found=found)

    async def CountRequests(
        self, request: peers_pb2.PeerCountRequest, context: grpc.aio.ServicerContext
    ) -> peers_pb2.PeerCountResponse:
        return peers_pb2.PeerCountResponse(requests_in_flight=len(self._admission))

    async def ListTraces(
        self, request: control_pb2.ListTracesRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListTracesResponse:
        found = self._traces.latest(request.limit, request.request_id)
        return control_pb2.ListTracesResponse(traces=[wire.trace_message(trace) for trace in found])

    async def Drain(
        self, request: control_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.DrainResponse:
        await self._drain(request.timeout_ms / 1000 if request.timeout_ms else None)
        return control_pb2.DrainResponse(requests_in_flight=len(self._admission))

    async def ReadMetrics(
        self, request: peers_pb2.PeerMetricsRequest, context: grpc.aio.ServicerContext
    ) -> peers_pb2.PeerMetricsResponse:
        return peers_pb2.PeerMetricsResponse(snapshot=await asyncio.to_thread(self._exposition.snapshot))
