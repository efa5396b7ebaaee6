"""Who a request belongs to: W3C trace context, and whether it is sampled.

`traceparent` and `tracestate` are those of https://www.w3.org/TR/trace-context/. Samplers are the ones that
OTEL_TRACES_SAMPLER names.
"""

import random
import re

import msgspec

PARENT = "traceparent"
STATE = "tracestate"
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MAX_STATE_CHARS = 512


class Caller(msgspec.Struct, frozen=True):
    """The caller's place in its own trace."""

    trace_id: bytes
    span_id: bytes
    sampled: bool
    state: str = ""


class TraceContext(msgspec.Struct, frozen=True):
    """A request's trace, and its own span in it. `parent_id` is empty where the trace begins here."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    sampled: bool
    state: str = ""

    @property
    def link(self) -> bytes:
        """What others need to point at the request's span: 24 bytes; none where nobody will see it."""
        return self.trace_id + self.span_id if self.sampled else b""


def parse(parent: str, state: str = "") -> Caller | None:
    """The caller of a `traceparent` header; None for one that is missing or not valid, as the standard wants it."""
    match = _TRACEPARENT.fullmatch(parent.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, further = match.groups()
    if version == "ff" or (version == "00" and further) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    state = state if len(state) <= MAX_STATE_CHARS else ""
    return Caller(bytes.fromhex(trace_id), bytes.fromhex(span_id), bool(int(flags, 16) & 1), state)


class Sampler(msgspec.Struct, frozen=True):
    """Which traces are kept: `ratio` of those that begin here; of a caller's those that it keeps, unless the caller is
    not asked (`parent_based` False)."""

    ratio: float = 1.0
    parent_based: bool = True

    def keeps(self, trace_id: bytes, caller: Caller | None) -> bool:
        if self.parent_based and caller is not None:
            return caller.sampled
        # As OpenTelemetry does it: by the low 8 bytes of the id, so that every service decides alike.
        return int.from_bytes(trace_id[8:], "big") < self.ratio * 2**64


def begin(caller: Caller | None, sampler: Sampler, draw: random.Random) -> TraceContext:
    """The context of a request that arrives now: a child of its caller's span, or the beginning of a trace."""
    trace_id = caller.trace_id if caller else draw.getrandbits(128).to_bytes(16, "big")
    span_id, kept = draw.getrandbits(64).to_bytes(8, "big"), sampler.keeps(trace_id, caller)
    if caller is None:
        return TraceContext(trace_id, span_id, b"", kept)
    return TraceContext(trace_id, span_id, caller.span_id, kept, caller.state)


def sampler_of(name: str, argument: str) -> Sampler:
    """The sampler that OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG name. Raises ValueError with what is wrong."""
    parent_based = name.startswith("parentbased_")
    match name.removeprefix("parentbased_"):
        case "" | "always_on":
            return Sampler(1.0, parent_based or not name)
        case "always_off":
            return Sampler(0.0, parent_based)
        case "traceidratio":
            return Sampler(_ratio(argument), parent_based)
    raise ValueError(
        f"OTEL_TRACES_SAMPLER={name}: known are always_on, always_off, traceidratio, each also after parentbased_"
    )


def _ratio(argument: str) -> float:
    try:
        ratio = float(argument or "1")
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ValueError(f"OTEL_TRACES_SAMPLER_ARG={argument}: give a share between 0 and 1")
    return ratio
