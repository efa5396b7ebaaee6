"""What happened in the core since it began, in plain numbers that outlive every worker group. Somebody else exports
them."""

import enum
from collections import deque
from dataclasses import dataclass, field

from services.scheduler.core.phases import Phase

MOST_UNTOLD = 4096
"""Durations that are kept for whoever drains them; a core that nobody asks drops the oldest."""


@enum.unique
class PreemptReason(enum.Enum):
    """Why a running sample went back to the queue."""

    BLOCKS = "blocks"
    STEP_FAILED = "step_failed"
    WORKER_LOST = "worker_lost"


@enum.unique
class Migration(enum.Enum):
    """What became of a sample whose worker was lost."""

    MOVED = "moved"
    FAILED = "failed"


@dataclass(slots=True)
class Counts:
    """Each only grows, but for `freed_ns`, which is drained."""

    prefix_queries: int = 0
    """Known tokens of samples at their first admission, where the prefix cache was asked."""
    prefix_hits: int = 0
    preemptions: dict[PreemptReason, int] = field(default_factory=lambda: dict.fromkeys(PreemptReason, 0))
    aborts: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(Phase, 0))
    migrations: dict[Migration, int] = field(default_factory=lambda: dict.fromkeys(Migration, 0))
    freed_ns: deque[int] = field(default_factory=lambda: deque(maxlen=MOST_UNTOLD))
    """For each aborted sample: from the abort to the end of the last step in flight that computed for it."""

    def drain_freed_ns(self) -> list[int]:
        freed = list(self.freed_ns)
        self.freed_ns.clear()
        return freed
