"""The traces of the last requests: kept for `sluice trace`, and handed to the exporter where there is one."""

import random
from collections import deque
from collections.abc import Callable

from shared.telemetry.context import Caller, Sampler, TraceContext, begin
from shared.telemetry.spans import Trace

KEPT = 256
"""Traces that ListTraces can show; about 4 KiB each."""


class Traces:
    """Owned by the router. `export` takes the sampled ones and must not wait."""

    def __init__(self, sampler: Sampler, export: Callable[[Trace], None] | None) -> None:
        self._sampler = sampler
        self._export = export
        self._draw = random.Random()
        self._kept: deque[Trace] = deque(maxlen=KEPT)

    def begin(self, caller: Caller | None) -> TraceContext:
        return begin(caller, self._sampler, self._draw)

    def add(self, trace: Trace) -> None:
        self._kept.append(trace)
        if self._export is not None and trace.sampled:
            self._export(trace)

    def latest(self, limit: int, request_id: str = "") -> list[Trace]:
        """The newest first; of one request where it is named by its id or its trace's."""
        found = [trace for trace in reversed(self._kept) if not request_id or request_id in _ids(trace)]
        return found[:limit]


def _ids(trace: Trace) -> tuple[str, str]:
    return trace.request_id, trace.trace_id.hex()
