"""A request's trace as values: built once, when the request has ended, from what was noted on the way."""

from collections.abc import Mapping, Sequence

import msgspec

Attribute = str | bool | int | float | Sequence[str] | Sequence[int]


class Span(msgspec.Struct, kw_only=True):
    """One stretch of a request's life. Times are nanoseconds after its arrival.

    `service` is a key of names.SERVICES, `instance` the process that it belongs to; `parent` is the index of its parent
    among the trace's spans, -1 for the first. `error` is empty or says how it failed.
    """

    name: str
    service: str
    instance: str
    parent: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Attribute] = {}
    error: str = ""
    links: Sequence[bytes] = ()
    """Of other traces' spans: trace id and span id, 24 bytes each."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class Trace(msgspec.Struct, kw_only=True):
    """A request, or a step of a worker. The first span is the whole of it, by the name `root_id`; `arrived_ns` is the
    wall clock's."""

    request_id: str
    trace_id: bytes
    root_id: bytes
    parent_id: bytes
    state: str = ""
    sampled: bool
    arrived_ns: int
    spans: list[Span]
