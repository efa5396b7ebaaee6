"""Traces to a collector by OTLP, from a thread of their own.

A trace costs the event loop one append. The thread turns traces into protobuf and sends them a batch at a time; what
finds the queue full is dropped and counted, so a collector that is dead, slow or refuses costs nothing but its traces.
OpenTelemetry's SDK is left out: a span with ten attributes took 18 to 69 µs there and 43 to 116 µs more to encode,
under the interpreter lock that the router's streams need (ops/decisions/traces.md).
"""

import gzip
import http.client
import random
import ssl
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from shared import __version__
from shared.config.load import ConfigError
from shared.config.otel import ExportConfig
from shared.telemetry.names import SERVICES
from shared.telemetry.spans import Attribute, Span, Trace

log = structlog.get_logger("otlp")

SAMPLED, PARENT_KNOWN, PARENT_REMOTE = 0x001, 0x100, 0x200
"""Bits of a span's flags: W3C's sampled, and whether its parent is known to lie in another process."""
SCHEDULER = "scheduler"
MAX_ANSWER_BYTES = 64 * 1024
RETRIES = 4
FIRST_RETRY_S = 0.5
RETRYABLE_GRPC = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.DATA_LOSS,
    }
)
RETRYABLE_HTTP = frozenset({429, 502, 503, 504})


class SendError(Exception):
    """A batch that the collector did not take."""

    def __init__(self, message: str, *, may_retry: bool) -> None:
        super().__init__(message)
        self.may_retry = may_retry


Send = Callable[[ExportTraceServiceRequest], ExportTraceServiceResponse]
"""Raises SendError."""


class Exporter:
    """Sends what `add` was given. `send` stands in for the collector in tests."""

    def __init__(self, config: ExportConfig, send: Send | None = None) -> None:
        self.dropped_spans = 0
        """Never sent: the queue was full, or the collector did not take them."""
        self.sent_spans = 0
        self._config = config
        self._send = send or _sender(config)
        self._queue: deque[Trace] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)
        self._thread.start()

    def add(self, trace: Trace) -> None:
        """For any thread; never waits."""
        if len(self._queue) >= self._config.max_queued:
            self.dropped_spans += len(trace.spans)
            return
        self._queue.append(trace)
        if len(self._queue) >= self._config.max_batch:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Sends what is queued as far as the time allows, and counts what is left."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout_s)
        while self._queue:
            self.dropped_spans += len(self._queue.popleft().spans)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(self._config.delay_s)
            self._wake.clear()
            self._flush()
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._config.max_batch))]
            num_spans = sum(len(trace.spans) for trace in batch)
            try:
                num_refused = self._deliver(batch)
            except SendError as error:
                num_refused = num_spans
                self._note_failure(str(error))
            except Exception as error:  # whatever it was, the thread lives on; its text may hold a header's secret
                num_refused = num_spans
                self._note_failure(type(error).__name__)
            self.dropped_spans += num_refused
            self.sent_spans += num_spans - num_refused

    def _deliver(self, batch: list[Trace]) -> int:
        """How many spans the collector refused. Raises SendError where it took nothing."""
        request, delay_s = encode(batch, self._config), FIRST_RETRY_S
        for attempt in range(RETRIES + 1):
            try:
                refused = self._send(request).partial_success
                break
            except SendError as error:
                if attempt == RETRIES or not error.may_retry or self._stopping.is_set():
                    raise
                self._stopping.wait(delay_s * random.uniform(0.8, 1.2))
                delay_s *= 2
        if refused.rejected_spans:
            self._note_failure(f"{refused.rejected_spans} spans refused: {refused.error_message}"[:200])
        else:
            self._failing = False
        return int(refused.rejected_spans)

    def _note_failure(self, reason: str) -> None:
        """Once until it works again."""
        if not self._failing:
            log.warning("traces_dropped", endpoint=self._config.endpoint, reason=reason)
        self._failing = True


def warn_of_ignored(variables: Sequence[str]) -> None:
    """OpenTelemetry's variables that are set and do nothing here: an operator who set them should know."""
    if variables:
        log.warning("otel_variables_ignored", variables=list(variables), known="ops/telemetry/README.md")


def encode(traces: Iterable[Trace], config: ExportConfig) -> ExportTraceServiceRequest:
    """Spans by the process that they belong to. Messages are filled in place: a third of what constructors cost."""
    request = ExportTraceServiceRequest()
    scopes: dict[tuple[str, str], trace_pb2.ScopeSpans] = {}
    for trace in traces:
        ids = [trace.root_id, *(random.getrandbits(64).to_bytes(8, "big") for _ in trace.spans[1:])]
        for span, span_id in zip(trace.spans, ids, strict=True):
            key = (span.service, span.instance)
            if key not in scopes:
                scopes[key] = _scope(request, *key, config)
            parent_id = trace.parent_id if span.parent < 0 else ids[span.parent]
            _fill(scopes[key].spans.add(), trace, span, span_id, parent_id)
    return request


def _scope(
    request: ExportTraceServiceRequest, service: str, instance: str, config: ExportConfig
) -> trace_pb2.ScopeSpans:
    own = service != SCHEDULER  # whose spans another service exports: our environment does not describe it
    facts = {
        **(config.resource if own else {}),
        "service.name": (own and config.service_name) or SERVICES[service],
        "service.instance.id": instance,
        "service.version": __version__,
    }
    resource_spans = request.resource_spans.add()
    _add(resource_spans.resource.attributes, facts)
    scope = resource_spans.scope_spans.add()
    scope.scope.name = "sluice"
    scope.scope.version = __version__
    return scope


def _fill(made: trace_pb2.Span, trace: Trace, span: Span, span_id: bytes, parent_id: bytes) -> None:
    is_root = span.parent < 0
    made.trace_id = trace.trace_id
    made.span_id = span_id
    made.parent_span_id = parent_id
    made.trace_state = trace.state
    made.name = span.name
    made.kind = trace_pb2.Span.SPAN_KIND_SERVER if is_root and not span.links else trace_pb2.Span.SPAN_KIND_INTERNAL
    made.start_time_unix_nano = trace.arrived_ns + span.start_ns
    made.end_time_unix_nano = trace.arrived_ns + span.end_ns
    made.flags = SAMPLED | PARENT_KNOWN | (PARENT_REMOTE if is_root and trace.parent_id else 0)
    _add(made.attributes, span.attributes)
    for link in span.links:
        made.links.add(trace_id=link[:16], span_id=link[16:])
    if span.error:
        made.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        made.status.message = span.error


def _add(to: Any, attributes: Mapping[str, Attribute]) -> None:
    for key, value in attributes.items():
        one = to.add()
        one.key = key
        _set(one.value, value)


def _set(made: AnyValue, value: Attribute) -> None:
    if isinstance(value, str):
        made.string_value = value
    elif isinstance(value, bool):
        made.bool_value = value
    elif isinstance(value, int):
        made.int_value = value
    elif isinstance(value, float):
        made.double_value = value
    else:
        made.array_value.SetInParent()
        for each in value:
            _set(made.array_value.values.add(), each)


# The two ways to send.


def _sender(config: ExportConfig) -> Send:
    return _grpc_sender(config) if config.protocol == "grpc" else _http_sender(config)


def _grpc_sender(config: ExportConfig) -> Send:
    address = urlsplit(config.endpoint)
    compression = grpc.Compression.Gzip if config.gzip else grpc.Compression.NoCompression
    if address.scheme == "https":
        files = (config.certificate, config.client_key, config.client_certificate)
        credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))
        channel = grpc.secure_channel(address.netloc, credentials, compression=compression)
    else:
        channel = grpc.insecure_channel(address.netloc, compression=compression)
    stub = TraceServiceStub(channel)
    metadata = tuple((key.lower(), value) for key, value in config.headers.items())

    def send(request: ExportTraceServiceRequest) -> ExportTraceServiceResponse:
        try:
            answer: ExportTraceServiceResponse = stub.Export(request, timeout=config.timeout_s, metadata=metadata)
            return answer
        except grpc.RpcError as error:
            code = error.code()
            raise SendError(f"{code.name}: {error.details()}"[:200], may_retry=code in RETRYABLE_GRPC) from None

    return send


def _http_sender(config: ExportConfig) -> Send:
    headers = {**config.headers, "Content-Type": "application/x-protobuf"}
    if config.gzip:
        headers["Content-Encoding"] = "gzip"
    tls = _tls(config) if config.endpoint.startswith("https:") else None

    def send(request: ExportTraceServiceRequest) -> ExportTraceServiceResponse:
        body = request.SerializeToString()
        posted = urllib.request.Request(config.endpoint, gzip.compress(body) if config.gzip else body, headers)
        try:
            with urllib.request.urlopen(posted, timeout=config.timeout_s, context=tls) as answer:
                return ExportTraceServiceResponse.FromString(answer.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            raise SendError(f"HTTP {error.code}", may_retry=error.code in RETRYABLE_HTTP) from None
        except OSError as error:
            raise SendError(str(error)[:200], may_retry=True) from None
        except (http.client.HTTPException, DecodeError) as error:
            raise SendError(f"it does not answer as OTLP over HTTP ({type(error).__name__})", may_retry=False) from None

    return send


def _tls(config: ExportConfig) -> ssl.SSLContext:
    try:
        tls = ssl.create_default_context(cafile=config.certificate or None)
        if config.client_certificate:
            tls.load_cert_chain(config.client_certificate, config.client_key or None)
    except OSError as error:
        raise ConfigError(f"traces cannot be sent to {config.endpoint} with these certificates: {error}") from None
    return tls
