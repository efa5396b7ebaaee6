"""What a client asks for and what it is told, as values."""

from collections.abc import Iterable, Mapping
from typing import Self

import msgspec


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request; None is unset and leaves the choice to the server. Exactly one of prompt, token_ids, messages."""

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    template_kwargs_json: str = ""
    tools_json: str = ""
    request_id: str = ""
    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_timing: bool = False
    priority: int = 0
    deterministic: bool | None = None
    cache_salt: str = ""
    structured: tuple[str, str | tuple[str, ...]] | None = None
    """What the answer must look like: a field of Structured in inference.proto and its value (a text, the options of
    "choice", nothing for "json_object")."""


class TopLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    token: bytes


class Logprobs(msgspec.Struct, frozen=True):
    """Of one token: raw log-probability, rank (1 is best), the best alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...] = ()


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Comes more than once only where the logprobs of a long prompt go on in the next."""

    request_id: str
    prompt_tokens: int
    seed: int
    prompt_logprobs: tuple[Logprobs, ...] = ()


class Delta(msgspec.Struct, frozen=True, tag=True):
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in nanoseconds, as in inference.proto."""

    total_ns: int
    admit_ns: int
    tokenize_ns: int
    route_ns: int
    schedule_ns: int
    link_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    deliver_ns: int
    time_to_first_token_ns: int
    preemptions: int
    queue_reason_ns: dict[str, int]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """`reason` is stop, length, abort or error; `stop_match` the stop string or token id that ended the sample."""

    index: int
    reason: str
    stop_match: str | int | None = None
    usage: Usage | None = None
    timing: Timing | None = None


Event = Accepted | Delta | Finished


class Model(msgspec.Struct, frozen=True):
    name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    has_chat_template: bool


class ServerInfo(msgspec.Struct, frozen=True):
    service: str
    version: str
    instance: str
    uptime_ms: int
    draining: bool
    models: tuple[str, ...]


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One worker group's requests and KV blocks; free + cached + referenced = total."""

    scheduler: str
    group: str
    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_referenced: int
    waiting_by_reason: dict[str, int] = {}


class Load(msgspec.Struct, frozen=True):
    groups: tuple[GroupLoad, ...]
    requests_in_flight: int


class TraceSpan(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a request's life; `parent` is the index of the one that it is a part of, -1 for none."""

    name: str
    service: str
    instance: str
    parent: int
    start_ns: int
    duration_ns: int
    attributes: Mapping[str, str]
    error: str


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a finished request's time went. The first span is the whole of it."""

    request_id: str
    trace_id: str
    arrived_unix_ns: int
    spans: tuple[TraceSpan, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer: of each sample its text, its tokens and how it ended."""

    request_id: str
    seed: int
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    reasons: tuple[str, ...]
    usage: Usage | None = None
    timing: Timing | None = None

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.texts[0]

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        """All events of one request, put together."""
        accepted: Accepted | None = None
        deltas: list[Delta] = []
        ends: dict[int, Finished] = {}
        for event in events:
            match event:
                case Accepted():
                    accepted = event
                case Delta():
                    deltas.append(event)
                case Finished():
                    ends[event.index] = event
        assert accepted is not None and ends  # a call that ended well has both
        samples = [[delta for delta in deltas if delta.index == index] for index in sorted(ends)]
        last = next((end for end in ends.values() if end.usage is not None), None)
        return cls(
            request_id=accepted.request_id,
            seed=accepted.seed,
            texts=tuple("".join(delta.text for delta in sample) for sample in samples),
            token_ids=tuple(tuple(one for delta in sample for one in delta.token_ids) for sample in samples),
            reasons=tuple(ends[index].reason for index in sorted(ends)),
            usage=last.usage if last else None,
            timing=last.timing if last else None,
        )
