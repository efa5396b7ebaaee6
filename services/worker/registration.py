"""Keeping this worker known to its scheduler: register, renew, register again after a restart on either side."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

import grpc
import structlog

from services.worker.identity import Lease, WorkerIdentity
from shared.clock import NS_PER_MS, monotonic_ns

log = structlog.get_logger("registration")

CALL_TIMEOUT_S = 2.0
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 1.0
FATAL_CODES = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED})
"""Answers that trying again cannot change: a worker that does not fit, or the wrong token."""


class RegistrationRefusedError(Exception):
    """The scheduler will not have this worker; the message is the scheduler's."""


class Registry(Protocol):
    """The scheduler's side, as `wire.RegistryClient` offers it."""

    async def register(self, identity: WorkerIdentity, timeout_s: float) -> Lease: ...

    async def renew(self, lease: Lease, progress: int, timeout_s: float) -> None: ...


class Registration:
    """Holds the lease. `on_change(True)` is awaited when the scheduler knows this worker, `on_change(False)` when it
    does not any more."""

    def __init__(
        self,
        registry: Registry,
        identity: WorkerIdentity,
        *,
        progress: Callable[[], int],
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._progress = progress
        self._on_change = on_change
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Renew now: something suggests that the scheduler restarted."""
        self._hurry.set()

    async def run(self) -> None:
        """Runs until cancelled. Raises RegistrationRefusedError."""
        while True:
            lease = await self._register()
            log.info("registered", lease=lease.id, ttl_ms=lease.ttl_ms)
            await self._on_change(True)
            await self._renew_until_lost(lease)
            await self._on_change(False)

    async def _register(self) -> Lease:
        backoff_s = FIRST_BACKOFF_S
        last: grpc.StatusCode | None = None
        reported: grpc.StatusCode | None = None
        while True:
            try:
                return await self._registry.register(self._identity, CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() in FATAL_CODES:
                    raise RegistrationRefusedError(error.details() or error.code().name) from None
                if error.code() is last is not reported:  # twice: a scheduler that stops first is no news
                    log.warning("register_failed", code=error.code().name, details=error.details())
                    reported = error.code()
                last = error.code()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    async def _renew_until_lost(self, lease: Lease) -> None:
        """Returns when the scheduler no longer knows the lease, or was not reached for the lease's whole time."""
        interval_s = lease.ttl_ms / 3000
        wait_s, renewed_ns = interval_s, monotonic_ns()
        reported: grpc.StatusCode | None = None
        while monotonic_ns() - renewed_ns < lease.ttl_ms * NS_PER_MS:
            await self._wait(wait_s)
            try:
                await self._registry.renew(lease, self._progress(), min(CALL_TIMEOUT_S, interval_s))
                wait_s, renewed_ns, reported = interval_s, monotonic_ns(), None
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    log.info("lease_gone", details=error.details())
                    return
                if error.code() is not reported:
                    log.warning("renew_failed", code=error.code().name, details=error.details())
                    reported = error.code()
                wait_s = min(FIRST_BACKOFF_S, interval_s)

    async def _wait(self, seconds: float) -> None:
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # Python 3.11's wait_for loses a cancellation that meets the event
                await self._hurry.wait()
