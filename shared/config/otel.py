"""OpenTelemetry's own variables, as the standard spells them; the flag `--otlp-traces-endpoint` goes before them."""

import os
from collections.abc import Mapping, Sequence
from urllib.parse import unquote, urlsplit

import msgspec

from shared.config.load import ConfigError
from shared.telemetry.context import Sampler, sampler_of

PROTOCOLS = ("grpc", "http/protobuf")
COMPRESSIONS = ("none", "gzip")
EXPORTERS = ("otlp", "none")
_FOR_TRACES = (
    "ENDPOINT",
    "PROTOCOL",
    "HEADERS",
    "TIMEOUT",
    "COMPRESSION",
    "INSECURE",
    "CERTIFICATE",
    "CLIENT_KEY",
    "CLIENT_CERTIFICATE",
)
HONOURED = frozenset(
    {
        "OTEL_SDK_DISABLED",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
        "OTEL_TRACES_EXPORTER",
        "OTEL_TRACES_SAMPLER",
        "OTEL_TRACES_SAMPLER_ARG",
        "OTEL_BSP_SCHEDULE_DELAY",
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        *(f"OTEL_EXPORTER_OTLP_{name}" for name in _FOR_TRACES),
        *(f"OTEL_EXPORTER_OTLP_TRACES_{name}" for name in _FOR_TRACES),
    }
)
_NOT_OURS = ("OTEL_METRICS_", "OTEL_METRIC_", "OTEL_LOGS_", "OTEL_BLRP_", "OTEL_PYTHON_", "OTEL_EXPORTER_OTLP_METRICS_")
"""Of signals that go elsewhere: metrics are scraped, logs go to standard output."""


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where traces go. `protocol` is grpc or http/protobuf; an `http://` endpoint is without TLS. The three files are
    PEM, empty where the system's authorities will do and no client certificate is shown."""

    endpoint: str
    protocol: str = "grpc"
    headers: Mapping[str, str] = {}
    timeout_s: float = 10.0
    delay_s: float = 1.0
    max_queued: int = 2048
    max_batch: int = 64
    """Traces, of about nine spans each."""
    gzip: bool = False
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    service_name: str = ""
    """Instead of "sluice-router" and its like, for all of this process's spans."""
    resource: Mapping[str, str] = {}


class TracingConfig(msgspec.Struct, frozen=True):
    """Which traces are kept, where they go (None: nowhere), and the variables that were set for nothing."""

    sampler: Sampler
    export: ExportConfig | None
    ignored: tuple[str, ...] = ()


def tracing_config(endpoint: str, environ: Mapping[str, str] | None = None) -> TracingConfig:
    """`endpoint` is the flag's, empty if it was not given. Raises ConfigError naming the variable."""
    environ = os.environ if environ is None else environ
    try:
        sampler = sampler_of(environ.get("OTEL_TRACES_SAMPLER", ""), environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    stated = (name for name in environ if name.startswith("OTEL_") and not name.startswith(_NOT_OURS))
    ignored = tuple(sorted(name for name in stated if name not in HONOURED))
    exporter = _choice("OTEL_TRACES_EXPORTER", environ.get("OTEL_TRACES_EXPORTER") or "otlp", EXPORTERS)
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return TracingConfig(sampler, None, ignored)
    return TracingConfig(sampler, _export(endpoint, environ), ignored)


def _export(flag: str, environ: Mapping[str, str]) -> ExportConfig | None:
    def read(name: str, default: str = "") -> str:
        """Of the traces' own variable, else of the one for all signals."""
        own = environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}")
        return own or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or default

    endpoint = flag or read("ENDPOINT")
    if not endpoint:
        return None
    protocol = _choice("OTEL_EXPORTER_OTLP_PROTOCOL", read("PROTOCOL", "grpc"), PROTOCOLS)
    if "://" not in endpoint:
        insecure = _choice("OTEL_EXPORTER_OTLP_INSECURE", read("INSECURE", "true").lower(), ("true", "false"))
        endpoint = f"{'http' if insecure == 'true' else 'https'}://{endpoint}"
    _require_address(endpoint)
    whole = flag or environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if protocol != "grpc" and not whole:
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return ExportConfig(
        endpoint=endpoint,
        protocol=protocol,
        headers=_pairs("OTEL_EXPORTER_OTLP_HEADERS", read("HEADERS")),
        timeout_s=_number("OTEL_EXPORTER_OTLP_TIMEOUT", read("TIMEOUT", "10000")) / 1000,
        delay_s=_number("OTEL_BSP_SCHEDULE_DELAY", environ.get("OTEL_BSP_SCHEDULE_DELAY", "1000")) / 1000,
        max_queued=_number("OTEL_BSP_MAX_QUEUE_SIZE", environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "2048")),
        max_batch=_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", environ.get("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "64")),
        gzip=_choice("OTEL_EXPORTER_OTLP_COMPRESSION", read("COMPRESSION", "none"), COMPRESSIONS) == "gzip",
        certificate=_file("OTEL_EXPORTER_OTLP_CERTIFICATE", read("CERTIFICATE")),
        client_key=_file("OTEL_EXPORTER_OTLP_CLIENT_KEY", read("CLIENT_KEY")),
        client_certificate=_file("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", read("CLIENT_CERTIFICATE")),
        service_name=environ.get("OTEL_SERVICE_NAME", ""),
        resource=_pairs("OTEL_RESOURCE_ATTRIBUTES", environ.get("OTEL_RESOURCE_ATTRIBUTES", "")),
    )


def _require_address(endpoint: str) -> None:
    """A slip would only show as traces that never arrive."""
    address = urlsplit(endpoint)
    try:
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number, or too large
        usable = False
    if not usable:
        raise ConfigError(f"traces cannot go to {endpoint!r}: give an address such as http://collector:4317")


def _choice(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"{name}={value}: known are {', '.join(known)}")
    return value


def _file(name: str, path: str) -> str:
    if path and not os.path.isfile(path):
        raise ConfigError(f"{name}={path}: there is no such file")
    return path


def _pairs(name: str, text: str) -> dict[str, str]:
    """`key=value,key=value`, percent-encoded."""
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, found, value = part.partition("=")
        if not found or not key.strip():
            raise ConfigError(f"{name}: {part!r} is not key=value")
        pairs[key.strip()] = unquote(value.strip())
    return pairs


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text}: give a whole number, at least 1")
    return int(text)
