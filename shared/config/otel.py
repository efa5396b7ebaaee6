"""OpenTelemetry's own variables, as the standard spells them; the flag `--otlp-traces-endpoint` goes before them."""

import os
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import msgspec

from shared.config.load import ConfigError
from shared.telemetry.context import Sampler, sampler_of

PROTOCOLS = ("grpc", "http/protobuf")


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where traces go. `protocol` is grpc or http/protobuf; an `http://` endpoint of grpc is without TLS."""

    endpoint: str
    protocol: str = "grpc"
    headers: Mapping[str, str] = {}
    timeout_s: float = 10.0
    delay_s: float = 1.0
    max_queued: int = 2048
    max_batch: int = 64
    service_name: str = ""
    """Instead of "sluice-router" and its like, for all of this process's spans."""
    resource: Mapping[str, str] = {}


class TracingConfig(msgspec.Struct, frozen=True):
    """Which traces are kept, and where they go (None: nowhere)."""

    sampler: Sampler
    export: ExportConfig | None


def tracing_config(endpoint: str, environ: Mapping[str, str] | None = None) -> TracingConfig:
    """`endpoint` is the flag's, empty if it was not given. Raises ConfigError naming the variable."""
    environ = os.environ if environ is None else environ
    try:
        sampler = sampler_of(environ.get("OTEL_TRACES_SAMPLER", ""), environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none":
        return TracingConfig(sampler, None)
    return TracingConfig(sampler, _export(endpoint, environ))


def _export(flag: str, environ: Mapping[str, str]) -> ExportConfig | None:
    def read(name: str, default: str = "") -> str:
        """Of the traces' own variable, else of the one for all signals."""
        own = environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}")
        return own or environ.get(f"OTEL_EXPORTER_OTLP_{name}") or default

    endpoint = flag or read("ENDPOINT")
    if not endpoint:
        return None
    _require_address(endpoint)
    protocol = read("PROTOCOL", "grpc")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: known are {', '.join(PROTOCOLS)}")
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
        service_name=environ.get("OTEL_SERVICE_NAME", ""),
        resource=_pairs("OTEL_RESOURCE_ATTRIBUTES", environ.get("OTEL_RESOURCE_ATTRIBUTES", "")),
    )


def _require_address(endpoint: str) -> None:
    """A slip would only show as traces that never arrive."""
    address = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    try:
        usable = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # a port that is no number, or too large
        usable = False
    if not usable:
        raise ConfigError(f"traces cannot go to {endpoint!r}: give an address such as http://collector:4317")


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
