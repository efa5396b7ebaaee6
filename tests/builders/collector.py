"""A trace collector that remembers: OTLP over gRPC on a free port, in this process."""

from concurrent import futures
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Collector(TraceServiceServicer):
    """`spans` are (service name, span) in the order of arrival. `credentials`: TLS, as grpc.ssl_server_credentials."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.metadata: dict[str, str] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)
        anywhere = "127.0.0.1:0"
        if credentials is None:
            self.address = f"127.0.0.1:{self._server.add_insecure_port(anywhere)}"
        else:
            self.address = f"localhost:{self._server.add_secure_port(anywhere, credentials)}"

    def Export(self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext) -> Any:
        self.metadata = dict(context.invocation_metadata())
        for resource in request.resource_spans:
            facts = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(facts["service.name"], span) for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def traces(self) -> dict[bytes, list[tuple[str, Any]]]:
        """By trace id."""
        found: dict[bytes, list[tuple[str, Any]]] = {}
        for service, span in list(self.spans):
            found.setdefault(span.trace_id, []).append((service, span))
        return found

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
