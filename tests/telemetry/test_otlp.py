"""Traces on their way to a collector: what is sent, and what a collector that does not take them costs."""

import contextlib
import gzip
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
import structlog
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from shared.config import ConfigError
from shared.config.otel import ExportConfig
from shared.telemetry.otlp import Exporter, SendError, encode
from shared.telemetry.spans import Span, Trace
from tests.builders.collector import Collector

TAKEN = ExportTraceServiceResponse()
TRACE_ID, PARENT_ID = b"t" * 16, b"p" * 8


def trace(request_id="r", parent_id=b"", error="") -> Trace:
    def span(name, service, parent, start, end, **more):
        return Span(name=name, service=service, instance="i", parent=parent, start_ns=start, end_ns=end, **more)

    spans = [
        span("generate", "router", -1, 0, 100, attributes={"s": "x", "b": True, "i": 3, "f": 0.5, "l": ["a", "b"]}),
        span("schedule", "router", 0, 10, 90, error=error),
        span("queue", "scheduler", 1, 20, 30),
    ]
    return Trace(
        request_id=request_id,
        trace_id=TRACE_ID,
        root_id=b"r" * 8,
        parent_id=parent_id,
        sampled=True,
        arrived_ns=1_000,
        spans=spans,
    )


def config(endpoint="", **changes) -> ExportConfig:
    return ExportConfig(endpoint=endpoint, delay_s=0.01, **changes)


def spans_of(request: ExportTraceServiceRequest) -> dict:
    return {
        span.name: (resource.resource, span)
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


def test_spans_are_encoded_under_the_process_that_they_belong_to():
    found = spans_of(encode([trace(parent_id=PARENT_ID, error="worker_lost")], config(resource={"zone": "a"})))
    whole, schedule, queue = (found[name][1] for name in ("generate", "schedule", "queue"))
    assert (whole.parent_span_id, schedule.parent_span_id, queue.parent_span_id) == (
        PARENT_ID,
        whole.span_id,
        schedule.span_id,
    )
    assert {span.trace_id for span in (whole, schedule, queue)} == {TRACE_ID}
    assert (whole.start_time_unix_nano, whole.end_time_unix_nano) == (1_000, 1_100)
    assert (whole.kind, queue.kind) == (2, 1)
    assert (schedule.status.code, schedule.status.message) == (2, "worker_lost")
    resources = {name: {a.key: a.value.string_value for a in found[name][0].attributes} for name in found}
    assert resources["generate"]["service.name"] == "sluice-router"
    assert resources["queue"]["service.name"] == "sluice-scheduler"
    assert (resources["generate"].get("zone"), resources["queue"].get("zone")) == ("a", None), "the router's own"
    kinds = {
        attribute.key: attribute.value.WhichOneof("value").removesuffix("_value") for attribute in whole.attributes
    }
    assert kinds == {"s": "string", "b": "bool", "i": "int", "f": "double", "l": "array"}


def test_a_collector_receives_them_over_grpc():
    with Collector() as collector:
        exporter = Exporter(config(f"http://{collector.address}", headers={"Authorization": "Bearer x"}))
        for _ in range(100):
            exporter.add(trace())
        exporter.close(5)
        assert len(collector.spans) == exporter.sent_spans == 300
        assert exporter.dropped_spans == 0
        assert collector.metadata["authorization"] == "Bearer x"


class Posted:
    """An HTTP collector: what was posted to it."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        bodies = self.bodies = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append((self.path, self.headers["Content-Encoding"], body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_collector_receives_them_over_http(gzipped):
    with Posted() as server:
        endpoint = f"http://127.0.0.1:{server.port}/v1/traces"
        exporter = Exporter(config(endpoint, protocol="http/protobuf", gzip=gzipped))
        exporter.add(trace())
        exporter.close(5)
    [(path, encoding, body)] = server.bodies
    assert (path, encoding) == ("/v1/traces", "gzip" if gzipped else None)
    body = gzip.decompress(body) if gzipped else body
    assert spans_of(ExportTraceServiceRequest.FromString(body)).keys() == {"generate", "schedule", "queue"}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Files of an authority and of a client that it vouches for, and the server's side of both."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    client, server = authority.issue_cert("client"), authority.issue_cert("localhost", "127.0.0.1")
    names = {name: str(folder / f"{name}.pem") for name in ("certificate", "client_key", "client_certificate")}
    authority.cert_pem.write_to_path(names["certificate"])
    client.private_key_pem.write_to_path(names["client_key"])
    client.cert_chain_pems[0].write_to_path(names["client_certificate"])
    return names, authority, server


def test_a_collector_behind_tls_that_asks_for_a_certificate_receives_them_over_grpc(certificates):
    files, authority, server = certificates
    pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    with Collector(credentials) as collector:
        for more, sent in ((files, 3), ({"certificate": files["certificate"]}, 0)):
            exporter = Exporter(config(f"https://{collector.address}", timeout_s=2, gzip=True, **more))
            exporter.add(trace())
            exporter.close(5)
            assert exporter.sent_spans == sent


def test_a_collector_behind_tls_that_asks_for_a_certificate_receives_them_over_http(certificates):
    files, authority, server = certificates
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.configure_cert(tls)
    authority.configure_trust(tls)
    tls.verify_mode = ssl.CERT_REQUIRED
    with Posted(tls) as collector:
        exporter = Exporter(config(f"https://localhost:{collector.port}/v1/traces", protocol="http/protobuf", **files))
        exporter.add(trace())
        exporter.close(5)
    assert exporter.sent_spans == 3


def test_certificates_that_are_none_are_refused_at_the_start(tmp_path):
    (tmp_path / "bad.pem").write_text("nothing of the kind")
    with pytest.raises(ConfigError, match="cannot be sent to https://localhost"):
        Exporter(config("https://localhost", protocol="http/protobuf", certificate=str(tmp_path / "bad.pem")))


def test_a_dead_collector_costs_its_traces_and_no_time():
    exporter = Exporter(config("http://127.0.0.1:1", max_queued=10, timeout_s=0.2))
    began = time.perf_counter()
    for _ in range(1000):
        exporter.add(trace())
    assert time.perf_counter() - began < 0.5
    exporter.close(5)
    assert exporter.sent_spans == 0
    assert exporter.dropped_spans == 3000


def test_a_slow_collector_blocks_nobody():
    going = threading.Event()
    exporter = Exporter(config("x", max_queued=4), send=lambda request: going.wait() and TAKEN)
    began = time.perf_counter()
    for _ in range(200):
        exporter.add(trace())
    assert time.perf_counter() - began < 0.2
    assert exporter.dropped_spans > 0
    going.set()
    exporter.close(5)
    assert exporter.sent_spans + exporter.dropped_spans == 600


@pytest.mark.parametrize(("may_retry", "calls"), [(True, 2), (False, 1)])
def test_only_what_may_be_tried_again_is(may_retry, calls, monkeypatch):
    monkeypatch.setattr("shared.telemetry.otlp.FIRST_RETRY_S", 0.01)
    seen = []

    def send(request):
        seen.append(request)
        if len(seen) == 1:
            raise SendError("busy", may_retry=may_retry)
        return TAKEN

    exporter = Exporter(config("x"), send=send)
    exporter.add(trace())
    deadline = time.monotonic() + 5
    while exporter.sent_spans + exporter.dropped_spans < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    exporter.close(5)
    assert len(seen) == calls
    assert exporter.sent_spans == (3 if may_retry else 0)


def outcome(exporter: Exporter, *, traces: int) -> tuple[int, int]:
    """What of so many traces was sent and dropped, each in a batch of its own, and that the thread lived on."""
    for sent in range(1, traces + 1):
        exporter.add(trace())
        exporter._wake.set()
        deadline = time.monotonic() + 5
        while exporter.sent_spans + exporter.dropped_spans < 3 * sent and time.monotonic() < deadline:
            time.sleep(0.01)
    assert exporter._thread.is_alive()
    exporter.close(5)
    return exporter.sent_spans, exporter.dropped_spans


def test_spans_that_a_collector_refuses_within_a_good_answer_are_counted():
    refusing = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=2, error_message="too old")
    )
    answers = [TAKEN, refusing, TAKEN]
    with structlog.testing.capture_logs() as logs:
        assert outcome(Exporter(config("x"), send=lambda request: answers.pop()), traces=3) == (7, 2)
    assert [entry["reason"] for entry in logs] == ["2 spans refused: too old"]


def test_a_collector_that_speaks_something_else_costs_its_traces_and_not_the_thread():
    """The gRPC port of a collector, asked by HTTP."""
    listener = socket.create_server(("127.0.0.1", 0))

    def babble():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(b"\x00\x00\x12\x04\x00\x00 not HTTP\r\n\r\n")
                connection.close()

    threading.Thread(target=babble, daemon=True).start()
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
    with structlog.testing.capture_logs() as logs:
        assert outcome(Exporter(config(endpoint, protocol="http/protobuf")), traces=2) == (0, 6)
    listener.close()
    assert [entry["event"] for entry in logs] == ["traces_dropped"]
    assert "does not answer as OTLP over HTTP" in logs[0]["reason"]


def test_a_header_that_cannot_be_sent_is_not_told_to_the_log():
    headers = {"authorization": "Bearer sec\nret"}
    with structlog.testing.capture_logs() as logs:
        exporter = Exporter(config("http://127.0.0.1:1/v1/traces", protocol="http/protobuf", headers=headers))
        assert outcome(exporter, traces=2) == (0, 6)
    assert [entry["reason"] for entry in logs] == ["ValueError"]
