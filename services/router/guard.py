"""The gate on the gRPC door: every method but health needs a key, and Control an admin's."""

from collections.abc import Awaitable, Callable

import grpc

from services.router.gate import Gate
from services.router.rejections import Rejections
from shared.net.server import refusing
from shared.outcome import RefusedError

AUTHORIZATION = "authorization"
OPEN = "/grpc.health."
ADMIN = "/sluice.v1.Control/"
GENERATE = "/sluice.v1.Inference/Generate"


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a key that opens them. Methods that are added later are closed too."""

    def __init__(self, gate: Gate, rejections: Rejections) -> None:
        self._gate = gate
        self._rejections = rejections

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN):
            return handler
        sent = dict(handler_call_details.invocation_metadata or ()).get(AUTHORIZATION, "")
        try:
            self._gate.key_of(str(sent), admin=method.startswith(ADMIN))
        except RefusedError as error:
            if method == GENERATE:
                self._rejections.reject(error.refusal, request_id="", door="grpc")
            return refusing(handler, error)
        return handler
