"""Places at the edge: how many requests are in flight, who they are, and when a refused one may try again."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Self

from services.router.allowances import Allowances
from services.router.gate import PUBLIC, Key
from services.router.limits import invalid
from shared.clock import NS_PER_MS, NS_PER_S, NowNs
from shared.outcome import AbortCause, refuse

RATE_WINDOW = 64
"""Finished requests over which the service rate is measured, at most."""
RATE_SPAN_NS = 60 * NS_PER_S
"""And the time: an end longer before the last says nothing of now, and what lies between may have been idle."""
UNKNOWN_RETRY_MS = 1_000
LONGEST_RETRY_MS = 30_000
SHORTEST_RETRY_MS = 50
DRAIN_RETRY_MS = 1_000


class Place:
    """One request in flight, from `with` to the end of its block. Whoever answers it says how it is aborted."""

    __slots__ = ("_abort", "_admission", "cause", "key", "request_id")

    def __init__(self, request_id: str, key: Key, admission: "Admission") -> None:
        self.request_id = request_id
        self.key = key
        self._admission = admission
        self.cause: AbortCause | None = None
        """Why it was aborted from outside, if it was."""
        self._abort: Callable[[AbortCause], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self)

    def on_abort(self, abort: Callable[[AbortCause], None]) -> None:
        """`abort` is called once, at once if the abort came first."""
        self._abort = abort
        if self.cause is not None:
            abort(self.cause)

    def abort(self, cause: AbortCause) -> None:
        """Ends the request early. The first cause stays."""
        if self.cause is None:
            self.cause = cause
            if self._abort is not None:
                self._abort(cause)


class Admission:
    """Owns the live requests. Full means refused at once: a queue here would only hide the scheduler's."""

    def __init__(self, max_in_flight: int, now: NowNs, processes: int = 1) -> None:
        """`max_in_flight` is of this process alone; what a key may use is shared out among `processes`."""
        self._max = max_in_flight
        self._now = now
        self._live: dict[tuple[str, str], Place] = {}
        """By tenant and request id."""
        self.allowances = Allowances(now, processes)
        self._ended_ns: deque[int] = deque(maxlen=RATE_WINDOW)
        self._refused_since_end = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._live)

    def admit(self, request_id: str, key: Key = PUBLIC) -> Place:
        """A place, to be left by its `with`. Raises RefusedError: draining, request_id_in_use, queue_full or
        quota_exceeded."""
        if self.draining:
            raise refuse("draining", "this router is shutting down; another will answer", retry_after_ms=DRAIN_RETRY_MS)
        if (key.tenant, request_id) in self._live:
            raise refuse("request_id_in_use", f"request_id {request_id!r} is in use", field="request_id")
        if len(self._live) >= self._max:
            self._refused_since_end += 1
            message = f"{self._max} requests are in flight at this router"
            raise refuse("queue_full", message, retry_after_ms=self.retry_after_ms())
        self.allowances.enter(key)
        place = self._live[key.tenant, request_id] = Place(request_id, key, self)
        self._empty.clear()
        return place

    def require_possible(self, num_prompts: int, key: Key = PUBLIC) -> None:
        """Raises RefusedError for prompts of one request that could never be in flight together."""
        most = min(self._max, self.allowances.max_requests(key) or self._max)
        if num_prompts > most:
            message = f"{num_prompts} prompts, each a request; {most} may be in flight at once here: send fewer"
            raise invalid("prompt", message)

    def leave(self, place: Place) -> None:
        """Its request is over."""
        self.allowances.leave(place.key)
        del self._live[place.key.tenant, place.request_id]
        self._ended_ns.append(self._now())
        while self._ended_ns[-1] - self._ended_ns[0] > RATE_SPAN_NS:
            self._ended_ns.popleft()
        self._refused_since_end = 0
        if not self._live:
            self._empty.set()

    def retry_after_ms(self) -> int:
        """When a place should be free for the next refused request, at the rate measured of late."""
        if len(self._ended_ns) < 2:
            return UNKNOWN_RETRY_MS
        each_ns = (self._ended_ns[-1] - self._ended_ns[0]) / (len(self._ended_ns) - 1)
        wait_ms = int(max(1, self._refused_since_end) * each_ns / NS_PER_MS)
        return min(LONGEST_RETRY_MS, max(SHORTEST_RETRY_MS, wait_ms))

    def abort(self, request_id: str, cause: AbortCause, key: Key = PUBLIC) -> bool:
        """Ends a live request of the key's tenant; False if there is none of that id."""
        place = self._live.get((key.tenant, request_id))
        if place is not None:
            place.abort(cause)
        return place is not None

    def abort_all(self, cause: AbortCause) -> None:
        for place in list(self._live.values()):
            place.abort(cause)

    async def wait_empty(self, timeout_s: float) -> bool:
        """True once nothing is in flight; False when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
