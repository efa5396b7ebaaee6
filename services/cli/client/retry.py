"""When a refused request is asked again: when the server says so, and nothing of its answer has been handed over."""

import random
import time

from services.cli.client.errors import CallError
from services.cli.client.values import Delta, Event, Finished

RETRYABLE = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE"})
JITTER = 0.25
"""Up to so much longer than the server says: those whom it refused together come back one by one."""


def hands_over(event: Event) -> bool:
    """Whether an event is a part of the answer. Accepted, and ends without success, are not: behind them another try
    can begin afresh."""
    return isinstance(event, Delta) or (isinstance(event, Finished) and event.reason in ("stop", "length"))


class Attempts:
    """The tries of one request. They share its deadline."""

    def __init__(self, retries: int, timeout_s: float | None) -> None:
        self._retries = retries
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: CallError) -> float | None:
        """How long to wait before the next try. None where there is to be none: tries are used up, the server does not
        say when, or the deadline comes first."""
        wait_s = error.retry_after_ms / 1000 * random.uniform(1, 1 + JITTER)
        left_s = self.left_s
        late = left_s is not None and wait_s >= left_s
        if not self._retries or error.status not in RETRYABLE or not error.retry_after_ms or late:
            return None
        self._retries -= 1
        return wait_s
