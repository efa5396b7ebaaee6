"""Serving gRPC: options, binding with a readable error, the shared-token check on internal ports."""

import hmac
from collections.abc import Awaitable, Callable, Sequence

import grpc

from shared.net.address import join_address
from shared.net.errors import GuardInterceptor
from shared.net.options import server_options
from shared.outcome import Refusal, RefusedError

TOKEN_HEADER = "x-sluice-internal-token"
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})


class BindError(Exception):
    """An address that cannot be served; the message says what to do."""


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses internal calls that lack the cluster's shared token. Health checks pass."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc.health."):
            return handler
        sent = dict(handler_call_details.invocation_metadata).get(TOKEN_HEADER, "")
        if hmac.compare_digest(str(sent).encode(), self._token):
            return handler
        message = "the internal token is missing or wrong"
        return refusing(handler, RefusedError(Refusal(name="unauthenticated", message=message)))


def refusing(handler: grpc.RpcMethodHandler, error: RefusedError) -> grpc.RpcMethodHandler:
    """A handler of the same kind that refuses every call."""

    async def behavior(request: object, context: grpc.aio.ServicerContext) -> None:
        raise error

    kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
    make = getattr(grpc, f"{kind[0]}_{kind[1]}_rpc_method_handler")
    return make(behavior, handler.request_deserializer, handler.response_serializer)


def create_server(
    *,
    max_receive_bytes: int,
    token: str = "",
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    reuse_port: bool = False,
) -> grpc.aio.Server:
    """A server whose handlers are guarded. `token` protects an internal port."""
    guards: list[grpc.aio.ServerInterceptor] = [GuardInterceptor()]
    if token:
        guards.append(TokenInterceptor(token))
    return grpc.aio.server(
        interceptors=[*guards, *interceptors],
        options=server_options(max_receive_bytes=max_receive_bytes, reuse_port=reuse_port),
    )


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    *,
    flag: str = "--port",
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Binds and returns the port (chosen by the system for port 0), which with credentials speaks TLS. Raises
    BindError."""
    address = join_address(host, port)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise BindError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            f"choose another with {flag}"
        )
    return bound


def require_private(host: str, token: str) -> None:
    """Internal ports beyond loopback need the shared token. Raises BindError."""
    if host not in LOOPBACK_HOSTS and not host.startswith(("unix:", "127.")) and not token:
        raise BindError(
            f"refusing to serve an internal port on {host} unprotected: set SLUICE_INTERNAL_TOKEN to one secret on "
            "every service of the cluster, or stay on 127.0.0.1"
        )
