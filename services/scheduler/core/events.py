"""What the core tells the rim: values, to be published to the router that asked."""

from collections.abc import Hashable

import msgspec

from shared.outcome import FinishReason, Refusal
from shared.sampling import TokenLogprobs

RequestKey = Hashable
"""Names a live request; chosen by whoever submits (the rim uses link and number)."""


class Tokens(msgspec.Struct, frozen=True):
    """Tokens of one sample, in order; `logprobs` has as many entries where they were asked for."""

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


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time in the scheduler went, in nanoseconds: queue + prefill + decode = total."""

    total_ns: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    preemptions: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    queue_reason_ns: dict[str, int] = {}


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """The request is gone: every sample ended and its blocks are free, or it was refused (`refusal`)."""

    key: RequestKey
    refusal: Refusal | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    durations: Durations = Durations()


Event = Tokens | SampleEnded | Released
