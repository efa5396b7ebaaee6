"""A small HTTP door: /metrics for Prometheus. Its threads answer; the event loop only notices that somebody calls."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, ThreadingWSGIServer
from prometheus_client.registry import Collector

from shared.net.address import join_address
from shared.net.server import BindError

MAX_CALLS = 16
"""Answered at once; one more is hung up on."""
READ_TIMEOUT_S = 5.0
"""For a caller that sends nothing."""

ANY_HOSTS = {"": "0.0.0.0", "localhost": "127.0.0.1"}


class _Handler(WSGIRequestHandler):
    timeout = READ_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes come every few seconds."""


class _Server(ThreadingWSGIServer):
    """One thread per call, few at a time."""

    request_queue_size = 2 * MAX_CALLS
    timeout = 0.0  # whoever calls handle_request knows that somebody is there

    def __init__(self, listening: socket.socket) -> None:
        self._places = threading.BoundedSemaphore(MAX_CALLS)
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()  # the one that the standard library made
        self.socket = listening
        self.server_address = listening.getsockname()
        # Without asking a name server for our own name, as the standard library does.
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()
        self.server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: callers come and go."""


class HttpDoor:
    """Serves from construction until `close`, on the running event loop."""

    def __init__(self, host: str, port: int, collector: Collector, *, flag: str) -> None:
        """Raises BindError, naming `flag`."""
        listening, self.address = listen(host, port, flag)
        self._server: WSGIServer = _Server(listening)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        self._server.set_app(_application(registry))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server.fileno(), self._server.handle_request)

    def close(self) -> None:
        """Answers that are being written end with the process."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.remove_reader(self._server.fileno())
        self._server.socket.close()


def listen(host: str, port: int, flag: str, *, shares_port: bool = False) -> tuple[socket.socket, str]:
    """A bound socket that does not block, and its address. A second service on its port is refused, not let share it,
    unless both want to. Raises BindError, naming `flag`."""
    bare = host.strip("[]")
    listening = socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shares_port else socket.SO_REUSEADDR, 1)
        listening.bind((ANY_HOSTS.get(bare, bare), port))
        listening.setblocking(False)  # a caller that was gone before it was answered must not hold up the loop
        return listening, join_address(host, listening.getsockname()[1])
    except (OSError, UnicodeError):
        listening.close()
        address = join_address(host, port)
        raise BindError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            f"choose another with {flag}"
        ) from None


def _application(registry: CollectorRegistry) -> Callable[..., Any]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
            case "GET", "/metrics":
                return _send(start_response, "200 OK", *text_of(registry))
            case "GET" | "HEAD", _:
                return _say(start_response, "404 Not Found")
        return _say(start_response, "405 Method Not Allowed")

    return answer


def text_of(registry: Collector) -> tuple[str, bytes]:
    """Content type and body of /metrics, in the text format that every Prometheus reads, whatever it asks for.

    Asked for OpenMetrics as Prometheus 2 does, prometheus-client 0.26 writes `sluice_` for `sluice:`, which no query
    finds.
    """
    return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)


def _say(start_response: Callable[..., Any], status: str) -> list[bytes]:
    text = status.partition(" ")[2].lower().encode() + b"\n"
    return _send(start_response, status, "text/plain; charset=utf-8", text)


def _send(start_response: Callable[..., Any], status: str, content_type: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(body)))])
    return [body]
