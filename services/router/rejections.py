"""Requests that were refused before they began: each is counted, and told of in the log, but not in floods."""

import structlog

from services.router.metrics import RouterMetrics
from shared.clock import NS_PER_S, NowNs
from shared.outcome import Refusal

log = structlog.get_logger("session")

MOST_A_SECOND = 10
"""Lines. What is left out is counted in the next one."""


class Rejections:
    """Called on the event loop."""

    def __init__(self, metrics: RouterMetrics, now: NowNs) -> None:
        self._metrics = metrics
        self._now = now
        self._left = float(MOST_A_SECOND)
        self._since_ns = now()
        self._untold = 0

    def reject(self, refusal: Refusal, *, request_id: str, door: str) -> None:
        """What a door refuses by itself: the session never hears of it."""
        self._metrics.reject(refusal.name)
        self.tell(refusal.name, field=refusal.field, request_id=request_id, door=door)

    def tell(self, end: str, *, request_id: str, door: str, field: str = "") -> None:
        """`end` is the refusal's name. Its message stays out: it may repeat what the client said."""
        now_ns = self._now()
        self._left = min(MOST_A_SECOND, self._left + (now_ns - self._since_ns) / NS_PER_S * MOST_A_SECOND)
        self._since_ns = now_ns
        if self._left < 1:
            self._untold += 1
            return
        self._left -= 1
        facts = {"field": field} if field else {}
        untold = {"more_untold": self._untold} if self._untold else {}
        self._untold = 0
        log.info("request", request_id=request_id, end=end, door=door, **facts, **untold)
