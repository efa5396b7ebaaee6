"""What the core tells the rim: values, to be published to the router that asked."""

from collections.abc import Hashable

import msgspec

from shared.outcome import FinishReason, Refusal
from shared.sampling import TokenLogprobs

RequestKey = Hashable
"""Names a live request; chosen by whoever submits (the rim uses link and number)."""
SampleName = tuple[RequestKey, int]
"""The request's key and the sample's index."""


class PlainTokens(msgspec.Struct, frozen=True):
    """Tokens without logprobs, one of each named sample: most of what a step tells, in one value."""

    names: list[SampleName]
    token_ids: list[int]


class Tokens(msgspec.Struct, frozen=True):
    """Tokens of one sample, in order, with the logprobs that were asked for: `logprobs` has one entry per token."""

    key: RequestKey
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class SampleEnded(msgspec.Struct, frozen=True):
    """The one end of one sample."""

    key: RequestKey
    index: int
    reason: FinishReason
    stop_token_id: int = -1


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a request's time in one phase ("queue", "prefill" or "decode").

    `steps`, `rows` and `device_ns` are of the steps that its worker group finished meanwhile: how many, the rows in all
    of them, and how long they ran. The others are the request's own: the rows that computed for it (`chunks`) and
    their tokens, those that it found in the cache, those that it sampled, and the preemptions that cut in. `reason_ns`
    says why it waited, where the phase is queue.
    """

    phase: str
    ns: int
    steps: int = 0
    rows: int = 0
    device_ns: int = 0
    chunks: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    preemptions: int = 0
    reason_ns: dict[str, int] = {}


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time in the scheduler went, in nanoseconds: queue + prefill + decode = total.

    `segments` say the same in the order in which it passed, and sum to the total too.
    """

    total_ns: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    preemptions: int = 0
    queue_reason_ns: dict[str, int] = {}
    segments: tuple[Segment, ...] = ()


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """The request is gone: every sample ended and its blocks are free, or it was refused (`refusal`)."""

    key: RequestKey
    refusal: Refusal | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    durations: Durations = Durations()


Event = PlainTokens | Tokens | SampleEnded | Released
