"""Command-line flags made from the configuration Structs, so that a flag, a variable and a TOML key cannot drift."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer

from shared.config import RouterConfig, SchedulerConfig, UpConfig, WorkerConfig, load_config

Kind = type[RouterConfig] | type[SchedulerConfig] | type[WorkerConfig] | type[UpConfig]

KINDS: dict[str, Kind] = {"router": RouterConfig, "scheduler": SchedulerConfig, "worker": WorkerConfig, "up": UpConfig}
"""Section of the TOML file → what it configures."""

HELP = {
    "advertise": "Where the scheduler reaches this worker; empty: host and port.",
    "allowed_origins": "An origin whose web pages may call the HTTP port, `*` for all; may be repeated.",
    "api_key": "A key that clients must send as `authorization: Bearer KEY`.",
    "api_key_file": "A TOML file of hashed keys, with a tenant and limits for each.",
    "block_size": "Tokens in one KV block.",
    "chat_template": "A file with a Jinja chat template to use instead of the checkpoint's.",
    "check_invariants": "Check the core's invariants after every step, not only on idle.",
    "deterministic": "Bit-identical answers whatever the batch, in every dtype (float32 on a CPU always is).",
    "device": "Where to compute; auto: an NVIDIA GPU where there is one, else the CPU.",
    "dtype": "Of weights and KV; auto: what the device is fast at.",
    "enable_prefix_caching": "Reuse the KV blocks of prompts that begin alike.",
    "enforce_eager": "Launch every kernel of a step from the host: no CUDA graphs.",
    "gpu_memory_utilization": "The share of a GPU's memory that weights and KV blocks may take.",
    "grpc_port": "The public gRPC port.",
    "heartbeat_timeout_ms": "A worker that makes no progress for so long is given up.",
    "host": "The address to listen on.",
    "internal_token": "A secret that all services of the cluster share; needed beyond loopback.",
    "kv_cache_memory_bytes": "Bytes of the KV pool; 0: a share of the free memory.",
    "lease_ttl_ms": "A worker that does not renew its lease for so long is given up.",
    "link_stall_timeout_ms": "A router that reads nothing for so long is disconnected.",
    "load_format": "auto: the checkpoint's weights; dummy: random ones by config.json alone, to measure with.",
    "log_content": "Prompts and answers go into the router's log, which they otherwise never do.",
    "log_format": "Of the log on standard error; auto: console on a terminal.",
    "long_prefill_token_threshold": "The most prompt tokens of one request in one step; 0: the whole budget.",
    "max_model_len": "The longest sequence, prompt and answer together; 0: the model's own limit.",
    "max_num_batched_tokens": "The token budget of one step.",
    "max_num_queued_reqs": "Requests held at once; one more is refused with RESOURCE_EXHAUSTED.",
    "max_num_seqs": "Sequences that run at once.",
    "max_plans_in_flight": "Plans sent to a worker ahead of its results.",
    "max_request_bytes": "The largest request message.",
    "max_unread_bytes": "A client with more unread text than this is ended.",
    "metrics_port": "The HTTP port of /metrics, 0: a free one. Of `up`: the scheduler's; the workers' follow.",
    "model": "A folder or a Hugging Face hub id; `bundled` is the model that comes with Sluice.",
    "num_gpu_blocks_override": "The number of KV blocks, on any device; 0: sized from memory.",
    "otlp_traces_endpoint": "Where traces go by OTLP; empty: where OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere.",
    "port": "The port to listen on: HTTP of a router (and of `up`), gRPC of a scheduler or worker.",
    "reasoning_parser": "How the model marks its reasoning; auto: as its chat template does, none: not told apart.",
    "revision": "Branch, tag or commit of a hub id.",
    "scheduler": "HOST:PORT of the scheduler.",
    "scheduler_port": "The scheduler's internal port; 0: a free one.",
    "scheduling_policy": "Who goes first.",
    "router_processes": "Processes that share the router's ports, where one is too slow for all streams.",
    "served_model_name": "The name that clients ask for; may be repeated.",
    "shutdown_timeout": "Seconds that a drain may take.",
    "slow_step_ms": "A step that runs for so long leaves a trace, where traces go anywhere; 0: none does.",
    "ssl_ca_certs": "Authorities (PEM) of clients, who must then show a certificate. Read again when it changes.",
    "ssl_certfile": "A certificate chain (PEM): HTTP and gRPC speak TLS alone. Read again when it changes.",
    "ssl_keyfile": "The private key of --ssl-certfile (PEM, without a password).",
    "stall_timeout_ms": "A client that reads nothing for so long while text waits for it is ended.",
    "threads": "Compute threads; 0: the physical cores.",
    "tokenizer": "A folder or hub id whose tokenizer to use instead of the model's.",
    "tokenizer_threads": "Threads that tokenize.",
    "tool_call_parser": "How the model calls tools; auto: as its chat template asks it to, none: no tools.",
    "worker_port": "The first worker's internal port, the others follow; 0: free ones.",
    "workers": "Workers under the one scheduler, each with its own copy of the model.",
}
"""One line for each field of every kind. A test holds the two together."""

SECRETS = frozenset({"api_key", "internal_token"})
"""Fields that travel to a child by its environment: a command line is for all to read."""


def flag(name: str) -> str:
    """A field's name as a flag: `max_num_seqs` is `--max-num-seqs`."""
    return "--" + name.replace("_", "-")


class Flag(msgspec.Struct, frozen=True):
    """One flag: a field of one or more kinds."""

    name: str
    type: Any
    """int, float, str, bool or list[str]: what the command line parses. load_config checks the rest."""
    default: Any
    choices: tuple[str, ...]


def fields_of(kind: Kind) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


def make_flags(kinds: Iterable[Kind], *, without: frozenset[str] = frozenset()) -> list[Flag]:
    """The union of the kinds' fields, the first kind's type and default winning."""
    flags: dict[str, Flag] = {}
    for kind in kinds:
        for name, field in fields_of(kind).items():
            if name not in flags and name not in without:
                flags[name] = _flag(name, field)
    return list(flags.values())


def _flag(name: str, field: msgspec.structs.FieldInfo) -> Flag:
    bare = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    choices: tuple[str, ...] = ()
    if get_origin(bare) is Literal:
        choices, bare = tuple(get_args(bare)), str
    if bare == tuple[str, ...]:
        bare = list[str]
    if bare not in (int, float, str, bool, list[str]):
        raise TypeError(f"{name}: no flag can be made from {field.type}")
    return Flag(name, bare, field.default, choices)


def parameter(flag_: Flag) -> inspect.Parameter:
    """The flag as a typer parameter. Unset is None, so that files and variables can speak."""
    declared = flag(flag_.name)
    if flag_.type is bool:
        declared += "/--no-" + declared.removeprefix("--")
    option = typer.Option(
        declared,
        help=_help(flag_),
        show_default=False,
        metavar=f"[{'|'.join(flag_.choices)}]" if flag_.choices else None,
        callback=_one_of(flag_.choices) if flag_.choices else None,
    )
    return inspect.Parameter(
        flag_.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[flag_.type | None, option],
    )


def _help(flag_: Flag) -> str:
    default = flag_.default
    if isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = ", ".join(default) if isinstance(default, tuple) else str(default)
    return f"{HELP[flag_.name]} Default: {shown}." if shown else HELP[flag_.name]


def _one_of(choices: tuple[str, ...]) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.")
        return value

    return check


def with_flags(function: Callable[..., None], flags: Iterable[Flag]) -> Callable[..., None]:
    """`function(own…, flags=dict)` as a function that typer can read: its own parameters, then one per flag."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "flags"]
    generated = [parameter(flag_) for flag_ in flags]

    def command(**given: Any) -> None:
        own_values = {p.name: given.pop(p.name) for p in own}
        # An unused repeatable flag may arrive as an empty list.
        function(**own_values, flags={name: _plain(v) for name, v in given.items() if v is not None and v != []})

    parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *generated]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def build(section: str, *, file: str, flags: Mapping[str, Any], without_variables: frozenset[str] = frozenset()) -> Any:
    """One section's configuration from defaults, file, environment and flags. Raises ConfigError.

    `without_variables` are fields whose variables mean another service.
    """
    foreign = {f"SLUICE_{name.upper()}" for name in without_variables}
    environ = {name: value for name, value in os.environ.items() if name not in foreign}
    return load_config(KINDS[section], section=section, file=file, environ=environ, flags=flags)


def secrets_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """Secrets that came as flags, as the variables by which a child gets them: `to_argv` leaves them out."""
    return {f"SLUICE_{name.upper()}": str(flags[name]) for name in SECRETS if name in flags}


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    """Flags as a child's command line: the inverse of parsing. Secrets are left out."""
    argv: list[str] = []
    for name, value in flags.items():
        if name in SECRETS:
            continue
        if isinstance(value, bool):
            argv.append(flag(name) if value else "--no-" + flag(name).removeprefix("--"))
        elif isinstance(value, tuple | list):
            argv.extend(f"{flag(name)}={item}" for item in value)
        else:
            argv.append(f"{flag(name)}={value}")
    return argv
