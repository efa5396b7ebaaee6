"""What each service can be told. A field `max_num_seqs` is the flag `--max-num-seqs`, the variable
`SLUICE_MAX_NUM_SEQS` and the key `max_num_seqs` of the TOML file."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
U16 = Annotated[int, Meta(ge=1, le=65535)]

BUNDLED_MODEL = "bundled"
"""The value of `model` that stands for the model that comes with Sluice."""


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The edge."""

    host: str = "127.0.0.1"
    port: Port = 8000
    """HTTP: OpenAI's API, /health and /metrics."""
    grpc_port: Port = 50051
    scheduler: tuple[str, ...] = ("127.0.0.1:50052",)
    model: str = BUNDLED_MODEL
    revision: str = ""
    tokenizer: str = ""
    served_model_name: tuple[str, ...] = ()
    chat_template: str = ""
    tool_call_parser: Literal[
        "auto",
        "none",
        "deepseek_v3",
        "deepseek_v31",
        "glm45",
        "hermes",
        "kimi_k2",
        "llama3_json",
        "llama4_pythonic",
        "mistral",
        "openai",
        "pythonic",
        "qwen3_coder",
    ] = "auto"
    """How the model calls tools; auto: as its chat template asks it to."""
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "qwen3", "mistral", "openai_gptoss"] = "auto"
    """How the model marks its reasoning; auto: as its chat template does."""
    max_num_queued_reqs: Positive = 512
    """Requests in flight at this router; one more is refused with RESOURCE_EXHAUSTED."""
    max_request_bytes: Positive = 8 * 2**20
    stall_timeout_ms: Positive = 30_000
    """A client that reads nothing for so long while text waits for it is ended."""
    max_unread_bytes: Positive = 4 * 2**20
    shutdown_timeout: Annotated[float, Meta(ge=0)] = 30.0
    """Seconds that a drain may take."""
    router_processes: Positive = 1
    """Processes on the same ports, for more streams than one can carry."""
    tokenizer_threads: Positive = 2
    otlp_traces_endpoint: str = ""
    """Where traces go; empty: where OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere."""
    allowed_origins: tuple[str, ...] = ()
    """Whose web pages may call the HTTP door; none unless named."""
    api_key: str = ""
    """A key that clients must send, and that may do everything."""
    api_key_file: str = ""
    """TOML: a table per key with its `sha256`, its `tenant` and its limits. Read again when it changes."""
    ssl_certfile: str = ""
    """Of HTTP and gRPC, which then speak TLS alone. Read again when it changes."""
    ssl_keyfile: str = ""
    ssl_ca_certs: str = ""
    """Whose certificates clients must show; empty: they need none. Read again when it changes."""
    internal_token: str = ""
    log_content: bool = False
    """Prompts and answers go into the log, which they otherwise never do."""
    log_format: Literal["auto", "json", "console"] = "auto"


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler and its core."""

    host: str = "127.0.0.1"
    port: Port = 50052
    metrics_port: Port = 9052
    max_num_seqs: U16 = 64
    max_num_batched_tokens: U16 = 2048
    long_prefill_token_threshold: NonNegative = 0
    """The most prompt tokens of one request in one step; 0: the whole budget."""
    max_model_len: NonNegative = 0
    """0: what the workers report."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_prefix_caching: bool = True
    max_num_queued_reqs: Positive = 2048
    max_plans_in_flight: Annotated[int, Meta(ge=1, le=2)] = 2
    lease_ttl_ms: Positive = 5000
    heartbeat_timeout_ms: Positive = 30_000
    """A worker whose step takes longer without progress is given up."""
    link_stall_timeout_ms: Positive = 30_000
    shutdown_timeout: Annotated[float, Meta(ge=0)] = 30.0
    check_invariants: bool = False
    """After every step, not only on idle."""
    internal_token: str = ""
    log_format: Literal["auto", "json", "console"] = "auto"


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device."""

    host: str = "127.0.0.1"
    port: Port = 50053
    metrics_port: Port = 9053
    scheduler: str = "127.0.0.1:50052"
    advertise: str = ""
    """Where the scheduler reaches this worker; empty: host and port."""
    model: str = BUNDLED_MODEL
    revision: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights by config.json alone, to measure with."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    block_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    kv_cache_memory_bytes: NonNegative = 0
    """0: a share of the free memory."""
    num_gpu_blocks_override: NonNegative = 0
    """The number of KV blocks, on any device; 0: sized from memory."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    max_num_seqs: U16 = 64
    max_num_batched_tokens: U16 = 2048
    max_model_len: NonNegative = 0
    deterministic: bool = False
    enforce_eager: bool = False
    """Without CUDA graphs."""
    otlp_traces_endpoint: str = ""
    """Where traces of slow steps go; empty: where OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere."""
    slow_step_ms: NonNegative = 1000
    """A step that runs for so long leaves a trace; 0: none does."""
    threads: NonNegative = 0
    """Compute threads; 0: the physical cores."""
    internal_token: str = ""
    log_format: Literal["auto", "json", "console"] = "auto"


class UpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sluice up`: what the local cluster has beyond its three services' own settings."""

    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    scheduler_port: Port = 50052
    worker_port: Port = 50053
    """The first worker's; the others follow. 0: free ones."""
    metrics_port: Port = 9052
    """The scheduler's; the workers' follow. 0: free ones."""
