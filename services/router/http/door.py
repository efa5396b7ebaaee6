"""The listening socket of the HTTP door: uvicorn in the router's own loop."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.router.certificate import Certificate
from shared.net.http import listen

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line and its headers."""
HEAD_TIMEOUT_S = 30.0
"""For the head of a request, from the connection or, on one that was used before, from its own first byte."""
KEEP_ALIVE_S = 65
"""For a connection without a request: longer than proxies and clients keep theirs, so that they are the ones to end
it."""
BACKLOG = 65_535
"""Connections of a crowd that wait to be taken in: as many as the kernel allows (net.core.somaxconn)."""
RELOAD_S = 1
"""The certificate's files are looked at so often."""
_TRANSPORT = "sluice.transport"


class Door:
    """Serves an ASGI application from `start` until `close`, on the running event loop."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        flag: str,
        certificate: Certificate | None = None,
        shares_port: bool = False,
    ) -> None:
        """With a certificate it speaks HTTPS alone."""
        self._where = (host, port, flag)
        self._shares_port = shares_port
        self.address = ""
        self._sockets: list[socket.socket] = []
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what matters is in our own log
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
            callback_notify=certificate.reload if certificate else None,
            timeout_notify=RELOAD_S,
        )
        config.load()
        config.ssl = certificate.context if certificate else None
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once calls are answered. Raises BindError."""
        listening, self.address = listen(*self._where, shares_port=self._shares_port)
        self._sockets.append(listening)
        await self._server.startup(self._sockets)
        self._ticking = asyncio.create_task(self._server.main_loop(), name="http")  # it keeps the Date of answers

    async def close(self, grace_s: float) -> None:
        """Calls in flight have so long to end."""
        if self._ticking is None:
            return
        self._ticking.cancel()
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # any number does
        await self._server.shutdown(self._sockets)


class _Protocol(HttpToolsProtocol):
    """With bounds on what a caller may send before it is heard, and a way to hang up on one who does not read."""

    _in_head = False
    _head_bytes = 0
    _head_deadline: asyncio.TimerHandle | None = None
    """uvicorn's own timer ends with the first byte; this one with the whole head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._head_deadline is None:  # these bytes ended the wait for a next request
            self._await_head()
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The head of the request exceeds {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[_TRANSPORT] = self.transport

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._end_deadline()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    def _end_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None


def hang_up(scope: Scope) -> None:
    """Closes the connection of a call at once, with whatever was still to be sent."""
    scope[_TRANSPORT].abort()
