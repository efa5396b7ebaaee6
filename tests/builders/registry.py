"""A scheduler's Registry for workers' tests: real gRPC, answers decided by the test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from shared.net.options import INTERNAL_MESSAGE_BYTES
from shared.net.server import bind, create_server
from shared.outcome import refuse
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import execution_pb2_grpc


class FakeRegistry(execution_pb2_grpc.RegistryServicer):
    """Grants leases of `ttl_ms`; remembers what came. `refusal` makes it refuse, `forget()` ends all leases."""

    def __init__(self, *, ttl_ms: int = 300, refusal: str = "") -> None:
        self.ttl_ms = ttl_ms
        self.refusal = refusal
        self.registered: list[pb.RegisterRequest] = []
        self.renewed: list[pb.RenewRequest] = []
        self.address = ""
        self._leases: set[int] = set()
        self._changed = asyncio.Event()

    def forget(self) -> None:
        self._leases.clear()

    async def Register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext) -> pb.RegisterResponse:
        if self.refusal:
            raise refuse("unsupported", self.refusal)
        self.registered.append(request)
        self._leases.add(len(self.registered))
        self._changed.set()
        return pb.RegisterResponse(lease=len(self.registered), ttl_ms=self.ttl_ms)

    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext) -> pb.RenewResponse:
        if request.lease not in self._leases:
            raise refuse("model_not_found", f"no lease {request.lease}")
        self.renewed.append(request)
        self._changed.set()
        return pb.RenewResponse()

    async def until(self, *, registered: int = 0, renewed: int = 0, timeout_s: float = 10.0) -> None:
        """Returns when so many calls have come."""

        async def wait() -> None:
            while len(self.registered) < registered or len(self.renewed) < renewed:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), timeout_s)


@contextlib.asynccontextmanager
async def serve_registry(registry: FakeRegistry, *, port: int = 0, token: str = "") -> AsyncIterator[FakeRegistry]:
    server = create_server(max_receive_bytes=INTERNAL_MESSAGE_BYTES, token=token)
    execution_pb2_grpc.add_RegistryServicer_to_server(registry, server)
    registry.address = f"127.0.0.1:{bind(server, '127.0.0.1', port)}"
    await server.start()
    try:
        yield registry
    finally:
        await server.stop(0)
