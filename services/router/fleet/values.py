"""What passes between a session and a link."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from shared import PROTOCOL_VERSION
from shared.outcome import AbortCause, FinishReason, Refusal
from shared.sampling import Sampling, Stopping, TokenLogprobs, Want
from shared.structured import Structured


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """One request for a scheduler, all its samples. `deadline_in_ns` 0: none."""

    request_id: str
    token_ids: Sequence[int]
    sampling: Sampling
    stopping: Stopping
    want: Want
    n: int = 1
    priority: int = 0
    deterministic: bool = False
    deadline_in_ns: int = 0
    salt: bytes = b""
    structured: Structured | None = None
    trace: bytes = b""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a request's time in one phase, the steps of its worker group that ended in it, and its own work; see
    scheduling.proto."""

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
    reason_ns: Mapping[str, int] = {}


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's account of a request: queue + prefill + decode = total, and so do the segments."""

    total_ns: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    preemptions: int = 0
    queue_reason_ns: Mapping[str, int] = {}
    segments: tuple[Segment, ...] = ()


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's last word about a request."""

    refusal: Refusal | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    durations: Durations = Durations()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request went and why: every candidate's cost in tokens (placement.py), and the winner's warm tokens."""

    target: str
    scheduler: str
    overlap_tokens: int
    candidates: tuple[str, ...]
    costs: tuple[int, ...]


class Sink(Protocol):
    """Who takes a request's events. Called on the event loop, in order, and never blocks; nothing follows
    `on_release`."""

    def on_tokens(
        self,
        index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        prompt_logprobs: Sequence[TokenLogprobs],
    ) -> None: ...

    def on_end(self, index: int, reason: FinishReason, stop_token_id: int) -> None: ...

    def on_release(self, release: Release) -> None: ...


class Ticket(Protocol):
    """A submitted request, seen from its session."""

    def abort(self, index: int, cause: AbortCause) -> None:
        """Ends one sample, or all (-1). Idempotent, valid at any time."""

    def forget(self) -> None:
        """The session ends: what still comes for this request is dropped."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One worker group's load."""

    group: str
    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_referenced: int = 0
    waiting_by_reason: Mapping[str, int] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler says of itself."""

    protocol_version: int
    scheduler: str
    ready: bool
    draining: bool
    model_fingerprint: str
    dtype: str
    block_size: int
    max_model_len: int
    vocab_size: int


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What this router can work with."""

    model_fingerprint: str
    vocab_size: int

    def mismatch(self, state: State) -> str:
        """Why a scheduler cannot be used; empty if it can."""
        if state.protocol_version != PROTOCOL_VERSION:
            return f"it speaks protocol version {state.protocol_version}, this router {PROTOCOL_VERSION}"
        if not state.ready:
            return ""  # the rest is known once a worker has registered
        if self.model_fingerprint and state.model_fingerprint not in ("", self.model_fingerprint):
            return f"its model is {state.model_fingerprint}, this router's is {self.model_fingerprint}"
        if state.vocab_size != self.vocab_size:
            return f"its vocabulary has {state.vocab_size} tokens, this router's model has {self.vocab_size}"
        if state.block_size < 1 or state.max_model_len < 1:
            return f"its block size {state.block_size} or maximum length {state.max_model_len} is not positive"
        return ""
