"""The same client for code without an event loop."""

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from services.cli.client import wire
from services.cli.client.asynchronous import DEFAULT_ADDRESS
from services.cli.client.errors import CallError
from services.cli.client.retry import Attempts, hands_over
from services.cli.client.values import Answer, Event, Load, Model, Request, ServerInfo, Trace
from shared.net.tls import Tls

T = TypeVar("T")


class Stream(Iterator[Event]):
    """The events of one request, as they come. A context manager: leaving it cancels the call. `cancel` may be called
    from any thread, also while a next try is waited for; the iteration then raises CallError CANCELLED."""

    def __init__(
        self, stubs: wire.Stubs, request: Request, *, metadata: wire.Metadata, timeout_s: float | None, retries: int
    ) -> None:
        self._stubs = stubs
        self._metadata = metadata
        self._message = wire.to_wire(request)
        self._timeout_s = timeout_s
        self._retries = retries
        self._call: Any = None
        self._cancelled = threading.Event()
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the call, which frees what it holds on the server."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def _run(self) -> Iterator[Event]:
        attempts = Attempts(self._retries, self._timeout_s)
        while True:
            held: list[Event] = []
            """What comes before the answer, until that has begun."""
            begun = not self._retries
            if self._cancelled.is_set():
                raise CallError("CANCELLED", "the call was cancelled")
            self._call = self._stubs.inference.Generate(self._message, timeout=attempts.left_s, metadata=self._metadata)
            if self._cancelled.is_set():  # since it was asked above: `cancel` may not have seen this call
                self._call.cancel()
            try:
                for response in self._call:
                    event = wire.from_wire(response)
                    if event is None:
                        continue
                    held.append(event)
                    begun = begun or hands_over(event)
                    while begun and held:
                        yield held.pop(0)
                failure = None
            except grpc.RpcError as error:
                failure = wire.call_error(error)
            finally:
                self._call.cancel()
            wait_s = attempts.wait_s(failure) if failure is not None and not begun else None
            if wait_s is not None:
                self._cancelled.wait(wait_s)
                continue
            yield from held
            if failure is not None:
                raise failure
            return


class BlockingClient:
    """One channel to one router. A context manager; may be shared by threads."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str = "", tls: Tls | None = None) -> None:
        """Plain text without `tls`. Raises ConfigError for files of `tls` that cannot be used."""
        self.address = address
        self._tls = tls
        self._metadata = wire.metadata_of(api_key)
        self._channel = (
            grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
            if tls is None
            else grpc.secure_channel(address, wire.credentials_of(tls), options=wire.CHANNEL_OPTIONS)
        )
        self._stubs = wire.Stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def connect(self, timeout_s: float) -> None:
        """Waits until the server answers. Raises CallError UNAVAILABLE."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            raise wire.nobody_at(self.address, self._tls) from None

    def generate(self, request: Request, *, timeout_s: float | None = None, retries: int = 0) -> Stream:
        """As Client.generate. Raises FieldError at once, CallError on the way."""
        return Stream(self._stubs, request, metadata=self._metadata, timeout_s=timeout_s, retries=retries)

    def complete(self, request: Request, *, timeout_s: float | None = None, retries: int = 0) -> Answer:
        """The whole answer. Raises as `generate` does."""
        with self.generate(request, timeout_s=timeout_s, retries=retries) as events:
            return Answer.of(events)

    def list_models(self, *, timeout_s: float = 10.0) -> tuple[Model, ...]:
        return self._call(wire.list_models(), timeout_s)

    def abort(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Ends a live request; False when the server knows none of that id."""
        return self._call(wire.abort(request_id), timeout_s)

    def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        return self._call(wire.server_info(), timeout_s)

    def load(self, *, timeout_s: float = 10.0) -> Load:
        return self._call(wire.load(), timeout_s)

    def traces(self, limit: int, request_id: str = "", *, timeout_s: float = 10.0) -> tuple[Trace, ...]:
        """As Client.traces."""
        return self._call(wire.traces(limit, request_id), timeout_s)

    def _call(self, call: wire.Unary[T], timeout_s: float) -> T:
        try:
            return call.read(call.method(self._stubs)(call.request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise wire.call_error(error) from None
