"""The client for asyncio."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

import grpc

from services.cli.client import wire
from services.cli.client.retry import Attempts, hands_over
from services.cli.client.values import Answer, Event, Load, Model, Request, ServerInfo, Trace
from shared.net.tls import Tls

DEFAULT_ADDRESS = "127.0.0.1:50051"
T = TypeVar("T")


class Client:
    """One channel to one router (or, for the control calls, a scheduler). An async context manager."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str = "", tls: Tls | None = None) -> None:
        """Plain text without `tls`. Raises ConfigError for files of `tls` that cannot be used."""
        self.address = address
        self._tls = tls
        self._metadata = wire.metadata_of(api_key)
        self._channel = (
            grpc.aio.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, wire.credentials_of(tls), options=wire.CHANNEL_OPTIONS)
        )
        self._stubs = wire.Stubs(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def connect(self, timeout_s: float) -> None:
        """Waits until the server answers. Raises CallError UNAVAILABLE."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            raise wire.nobody_at(self.address, self._tls) from None

    async def generate(
        self,
        request: Request,
        *,
        timeout_s: float | None = None,
        retries: int = 0,
        metadata: wire.Metadata = (),
    ) -> AsyncGenerator[Event, None]:
        """The request's events. Leaving the iteration cancels the call, which frees what it holds on the server.

        Refused with a delay (overload, drain, a lost worker) before the first token, it is asked again up to `retries`
        times, all within `timeout_s`; what comes before the answer is then held until that begins. Raises CallError,
        and FieldError before anything is sent.
        """
        message, attempts, sent = wire.to_wire(request), Attempts(retries, timeout_s), (*self._metadata, *metadata)
        while True:
            held: list[Event] = []
            """What comes before the answer, until that has begun."""
            begun = not retries
            call = self._stubs.inference.Generate(message, timeout=attempts.left_s, metadata=sent)
            try:
                async for response in call:
                    event = wire.from_wire(response)
                    if event is None:
                        continue
                    held.append(event)
                    begun = begun or hands_over(event)
                    while begun and held:
                        yield held.pop(0)
                failure = None
            except grpc.aio.AioRpcError as error:
                failure = wire.call_error(error)
            finally:
                call.cancel()
            wait_s = attempts.wait_s(failure) if failure is not None and not begun else None
            if wait_s is not None:
                await asyncio.sleep(wait_s)
                continue
            for event in held:
                yield event
            if failure is not None:
                raise failure
            return

    async def complete(self, request: Request, *, timeout_s: float | None = None, retries: int = 0) -> Answer:
        """The whole answer. Raises as `generate` does."""
        async with aclosing(self.generate(request, timeout_s=timeout_s, retries=retries)) as events:
            return Answer.of([event async for event in events])

    async def list_models(self, *, timeout_s: float = 10.0) -> tuple[Model, ...]:
        return await self._call(wire.list_models(), timeout_s)

    async def abort(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Ends a live request; False when the server knows none of that id."""
        return await self._call(wire.abort(request_id), timeout_s)

    async def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        return await self._call(wire.server_info(), timeout_s)

    async def load(self, *, timeout_s: float = 10.0) -> Load:
        return await self._call(wire.load(), timeout_s)

    async def traces(self, limit: int, request_id: str = "", *, timeout_s: float = 10.0) -> tuple[Trace, ...]:
        """Of the last finished requests, the newest first; of one where it is named by its id or its trace's."""
        return await self._call(wire.traces(limit, request_id), timeout_s)

    async def drain(self, *, drain_timeout_ms: int = 0, timeout_s: float = 10.0) -> int:
        """Asks the service to finish and exit; returns how many requests it still holds."""
        return await self._call(wire.drain(drain_timeout_ms), timeout_s)

    async def _call(self, call: wire.Unary[T], timeout_s: float) -> T:
        try:
            return call.read(await call.method(self._stubs)(call.request, timeout=timeout_s, metadata=self._metadata))
        except grpc.aio.AioRpcError as error:
            raise wire.call_error(error) from None
