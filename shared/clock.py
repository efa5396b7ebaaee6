"""Time as a value that is passed in, so that cores stay pure and tests own the clock."""

import time
from collections.abc import Callable

NowNs = Callable[[], int]
"""Returns nanoseconds of a monotonic clock. Comparable within one process only."""

monotonic_ns: NowNs = time.monotonic_ns

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
