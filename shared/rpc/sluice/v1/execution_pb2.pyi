from shared.rpc.sluice.v1 import scheduling_pb2 as _scheduling_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("protocol_version", "worker", "address", "model_fingerprint", "dtype", "device", "block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "vocab_size", "rank", "world", "block_bytes", "windows")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker: str
    address: str
    model_fingerprint: str
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    rank: int
    world: int
    block_bytes: int
    windows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol_version: _Optional[int] = ..., worker: _Optional[str] = ..., address: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., block_bytes: _Optional[int] = ..., windows: _Optional[_Iterable[int]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease", "ttl_ms")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    ttl_ms: int
    def __init__(self, lease: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease", "progress")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    lease: int
    progress: int
    def __init__(self, lease: _Optional[int] = ..., progress: _Optional[int] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("begin", "plan", "prepare", "forget")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    begin: ExecuteBegin
    plan: StepPlan
    prepare: Prepare
    forget: Forget
    def __init__(self, begin: _Optional[_Union[ExecuteBegin, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ...) -> None: ...

class ExecuteBegin(_message.Message):
    __slots__ = ("epoch", "scheduler")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    scheduler: str
    def __init__(self, epoch: _Optional[int] = ..., scheduler: _Optional[str] = ...) -> None: ...

class ExecuteReply(_message.Message):
    __slots__ = ("ready", "result", "prepared")
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    ready: ExecuteReady
    result: StepResult
    prepared: Prepared
    def __init__(self, ready: _Optional[_Union[ExecuteReady, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("id", "grammar")
    ID_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    id: int
    grammar: _scheduling_pb2.Grammar
    def __init__(self, id: _Optional[int] = ..., grammar: _Optional[_Union[_scheduling_pb2.Grammar, _Mapping]] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: int
    def __init__(self, id: _Optional[int] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: str
    def __init__(self, id: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class ExecuteReady(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("step", "exact", "admits", "slots", "counts", "block_counts", "samples", "blocks")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    ADMITS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    step: int
    exact: bool
    admits: _containers.RepeatedCompositeFieldContainer[Admit]
    slots: bytes
    counts: bytes
    block_counts: bytes
    samples: bytes
    blocks: bytes
    def __init__(self, step: _Optional[int] = ..., exact: bool = ..., admits: _Optional[_Iterable[_Union[Admit, _Mapping]]] = ..., slots: _Optional[bytes] = ..., counts: _Optional[bytes] = ..., block_counts: _Optional[bytes] = ..., samples: _Optional[bytes] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class Admit(_message.Message):
    __slots__ = ("slot", "token_ids", "prompt_len", "computed", "tables", "sample_index", "sampling", "min_tokens", "stop_token_ids", "logprobs", "prompt_logprobs", "trace", "grammar")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    slot: int
    token_ids: bytes
    prompt_len: int
    computed: int
    tables: _containers.RepeatedCompositeFieldContainer[BlockTable]
    sample_index: int
    sampling: _scheduling_pb2.RowSampling
    min_tokens: int
    stop_token_ids: bytes
    logprobs: int
    prompt_logprobs: int
    trace: bytes
    grammar: int
    def __init__(self, slot: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., prompt_len: _Optional[int] = ..., computed: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[BlockTable, _Mapping]]] = ..., sample_index: _Optional[int] = ..., sampling: _Optional[_Union[_scheduling_pb2.RowSampling, _Mapping]] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., trace: _Optional[bytes] = ..., grammar: _Optional[int] = ...) -> None: ...

class BlockTable(_message.Message):
    __slots__ = ("first", "blocks")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    first: int
    blocks: bytes
    def __init__(self, first: _Optional[int] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "tokens", "logprobs", "prompt_logprobs", "wait_ns", "run_ns", "error", "grammar_errors")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    RUN_NS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_ERRORS_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[RowLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[RowPromptLogprobs]
    wait_ns: int
    run_ns: int
    error: str
    grammar_errors: _containers.RepeatedCompositeFieldContainer[GrammarError]
    def __init__(self, step: _Optional[int] = ..., tokens: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[RowLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[RowPromptLogprobs, _Mapping]]] = ..., wait_ns: _Optional[int] = ..., run_ns: _Optional[int] = ..., error: _Optional[str] = ..., grammar_errors: _Optional[_Iterable[_Union[GrammarError, _Mapping]]] = ...) -> None: ...

class GrammarError(_message.Message):
    __slots__ = ("row", "message")
    ROW_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    row: int
    message: str
    def __init__(self, row: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class RowLogprobs(_message.Message):
    __slots__ = ("row", "logprobs")
    ROW_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    row: int
    logprobs: _scheduling_pb2.TokenLogprobs
    def __init__(self, row: _Optional[int] = ..., logprobs: _Optional[_Union[_scheduling_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class RowPromptLogprobs(_message.Message):
    __slots__ = ("row", "start", "logprobs")
    ROW_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    row: int
    start: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_scheduling_pb2.TokenLogprobs]
    def __init__(self, row: _Optional[int] = ..., start: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_scheduling_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...
