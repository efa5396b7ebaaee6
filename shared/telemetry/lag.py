"""How late an event loop is: what every request of its process waits for, and nobody's own account shows."""

import asyncio

from shared.clock import NS_PER_S, monotonic_ns
from shared.telemetry.exposition import Histogram
from shared.telemetry.metrics import LOOP_LAG

INTERVAL_S = 0.1
"""Ten timers a second took 0.1 % of a core."""


class LoopLag:
    """A timer that notes how much later than asked for it ran."""

    def __init__(self) -> None:
        self.histogram = Histogram(LOOP_LAG)
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """On the loop to be watched. Its own clock may count whole milliseconds (uvloop's does): ours does not."""
        due_ns = monotonic_ns() + int(INTERVAL_S * NS_PER_S)
        self._handle = asyncio.get_running_loop().call_later(INTERVAL_S, self._note, due_ns)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _note(self, due_ns: int) -> None:
        self.histogram.observe(max(0, monotonic_ns() - due_ns) / NS_PER_S)
        self.start()
