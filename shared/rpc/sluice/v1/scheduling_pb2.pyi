from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbortCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ABORT_CAUSE_UNSPECIFIED: _ClassVar[AbortCause]
    ABORT_CAUSE_CLIENT: _ClassVar[AbortCause]
    ABORT_CAUSE_STOP_STRING: _ClassVar[AbortCause]
    ABORT_CAUSE_DEADLINE: _ClassVar[AbortCause]
    ABORT_CAUSE_STALLED: _ClassVar[AbortCause]
    ABORT_CAUSE_DRAIN: _ClassVar[AbortCause]
ABORT_CAUSE_UNSPECIFIED: AbortCause
ABORT_CAUSE_CLIENT: AbortCause
ABORT_CAUSE_STOP_STRING: AbortCause
ABORT_CAUSE_DEADLINE: AbortCause
ABORT_CAUSE_STALLED: AbortCause
ABORT_CAUSE_DRAIN: AbortCause

class RouterFrame(_message.Message):
    __slots__ = ("hello", "submits", "aborts")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    hello: LinkHello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    aborts: _containers.RepeatedCompositeFieldContainer[LinkAbort]
    def __init__(self, hello: _Optional[_Union[LinkHello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., aborts: _Optional[_Iterable[_Union[LinkAbort, _Mapping]]] = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("protocol_version", "router")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    router: str
    def __init__(self, protocol_version: _Optional[int] = ..., router: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "token_ids", "more", "request_id", "sampling", "n", "max_tokens", "min_tokens", "stop_token_ids", "priority", "deterministic", "logprobs", "prompt_logprobs", "deadline_in_ns", "salt", "stops_on_text", "trace", "grammar")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_IN_NS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    STOPS_ON_TEXT_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    key: int
    token_ids: bytes
    more: bool
    request_id: str
    sampling: RowSampling
    n: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: bytes
    priority: int
    deterministic: bool
    logprobs: int
    prompt_logprobs: int
    deadline_in_ns: int
    salt: bytes
    stops_on_text: bool
    trace: bytes
    grammar: Grammar
    def __init__(self, key: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., more: bool = ..., request_id: _Optional[str] = ..., sampling: _Optional[_Union[RowSampling, _Mapping]] = ..., n: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., priority: _Optional[int] = ..., deterministic: bool = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., deadline_in_ns: _Optional[int] = ..., salt: _Optional[bytes] = ..., stops_on_text: bool = ..., trace: _Optional[bytes] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text", "reasoning_close", "reasoning_open", "call_open", "call_close")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REASONING_CLOSE_FIELD_NUMBER: _ClassVar[int]
    REASONING_OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_CLOSE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    reasoning_close: str
    reasoning_open: str
    call_open: str
    call_close: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ..., reasoning_close: _Optional[str] = ..., reasoning_open: _Optional[str] = ..., call_open: _Optional[str] = ..., call_close: _Optional[str] = ...) -> None: ...

class RowSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class LinkAbort(_message.Message):
    __slots__ = ("key", "index", "cause")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    key: int
    index: int
    cause: AbortCause
    def __init__(self, key: _Optional[int] = ..., index: _Optional[int] = ..., cause: _Optional[_Union[AbortCause, str]] = ...) -> None: ...

class SchedulerFrame(_message.Message):
    __slots__ = ("state", "tokens", "ends", "released", "loads", "blocks_stored", "blocks_removed", "plain_tokens")
    STATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_STORED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    PLAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    state: SchedulerState
    tokens: _containers.RepeatedCompositeFieldContainer[TokensEvent]
    ends: _containers.RepeatedCompositeFieldContainer[SampleEnd]
    released: _containers.RepeatedCompositeFieldContainer[Released]
    loads: LinkLoads
    blocks_stored: bytes
    blocks_removed: bytes
    plain_tokens: bytes
    def __init__(self, state: _Optional[_Union[SchedulerState, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[TokensEvent, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[SampleEnd, _Mapping]]] = ..., released: _Optional[_Iterable[_Union[Released, _Mapping]]] = ..., loads: _Optional[_Union[LinkLoads, _Mapping]] = ..., blocks_stored: _Optional[bytes] = ..., blocks_removed: _Optional[bytes] = ..., plain_tokens: _Optional[bytes] = ...) -> None: ...

class SchedulerState(_message.Message):
    __slots__ = ("protocol_version", "scheduler", "ready", "draining", "model_fingerprint", "dtype", "block_size", "max_model_len", "vocab_size")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    scheduler: str
    ready: bool
    draining: bool
    model_fingerprint: str
    dtype: str
    block_size: int
    max_model_len: int
    vocab_size: int
    def __init__(self, protocol_version: _Optional[int] = ..., scheduler: _Optional[str] = ..., ready: bool = ..., draining: bool = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class LinkLoads(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[LinkLoad]
    def __init__(self, groups: _Optional[_Iterable[_Union[LinkLoad, _Mapping]]] = ...) -> None: ...

class LinkLoad(_message.Message):
    __slots__ = ("group", "requests_running", "requests_waiting", "kv_blocks_total", "kv_blocks_free", "kv_blocks_cached", "kv_blocks_referenced", "waiting_by_reason")
    class WaitingByReasonEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_REFERENCED_FIELD_NUMBER: _ClassVar[int]
    WAITING_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    group: str
    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_referenced: int
    waiting_by_reason: _containers.ScalarMap[str, int]
    def __init__(self, group: _Optional[str] = ..., requests_running: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_referenced: _Optional[int] = ..., waiting_by_reason: _Optional[_Mapping[str, int]] = ...) -> None: ...

class TokensEvent(_message.Message):
    __slots__ = ("key", "index", "token_ids", "logprobs", "prompt_logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    index: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, key: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_ids: bytes
    top_logprobs: bytes
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class SampleEnd(_message.Message):
    __slots__ = ("key", "index", "reason", "stop_token_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    key: int
    index: int
    reason: str
    stop_token_id: int
    def __init__(self, key: _Optional[int] = ..., index: _Optional[int] = ..., reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("key", "refusal", "message", "retry_after_ms", "cached_tokens", "completion_tokens", "durations", "field")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATIONS_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    key: int
    refusal: str
    message: str
    retry_after_ms: int
    cached_tokens: int
    completion_tokens: int
    durations: PhaseDurations
    field: str
    def __init__(self, key: _Optional[int] = ..., refusal: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., durations: _Optional[_Union[PhaseDurations, _Mapping]] = ..., field: _Optional[str] = ...) -> None: ...

class PhaseDurations(_message.Message):
    __slots__ = ("total_ns", "queue_ns", "prefill_ns", "decode_ns", "preemptions", "queue_reason_ns", "segments")
    class QueueReasonNsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_REASON_NS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    total_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    preemptions: int
    queue_reason_ns: _containers.ScalarMap[str, int]
    segments: _containers.RepeatedCompositeFieldContainer[PhaseSegment]
    def __init__(self, total_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., prefill_ns: _Optional[int] = ..., decode_ns: _Optional[int] = ..., preemptions: _Optional[int] = ..., queue_reason_ns: _Optional[_Mapping[str, int]] = ..., segments: _Optional[_Iterable[_Union[PhaseSegment, _Mapping]]] = ...) -> None: ...

class PhaseSegment(_message.Message):
    __slots__ = ("phase", "ns", "steps", "rows", "device_ns", "chunks", "computed_tokens", "cached_tokens", "sampled_tokens", "preemptions", "reason_ns")
    class ReasonNsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_NS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    ns: int
    steps: int
    rows: int
    device_ns: int
    chunks: int
    computed_tokens: int
    cached_tokens: int
    sampled_tokens: int
    preemptions: int
    reason_ns: _containers.ScalarMap[str, int]
    def __init__(self, phase: _Optional[str] = ..., ns: _Optional[int] = ..., steps: _Optional[int] = ..., rows: _Optional[int] = ..., device_ns: _Optional[int] = ..., chunks: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., sampled_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., reason_ns: _Optional[_Mapping[str, int]] = ...) -> None: ...
