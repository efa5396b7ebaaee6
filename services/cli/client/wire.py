"""Values ⇄ protobuf: the only file of the client that knows messages."""

import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.cli.client.errors import CallError, FieldError
from services.cli.client.values import (
    Accepted,
    Delta,
    Event,
    Finished,
    GroupLoad,
    Load,
    Logprobs,
    Model,
    Request,
    ServerInfo,
    Timing,
    TopLogprob,
    Trace,
    TraceSpan,
    Usage,
)
from shared.net.tls import Tls, content
from shared.rpc.sluice.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class Stubs:
    """The methods of one channel, of either kind."""

    def __init__(self, channel: Any) -> None:
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.control = control_pb2_grpc.ControlStub(channel)


class Unary(msgspec.Struct, Generic[T], frozen=True):
    """A call with one answer: the method, what it is asked, and how its answer is read."""

    method: Callable[[Stubs], Any]
    request: Any
    read: Callable[[Any], T]


def list_models() -> Unary[tuple[Model, ...]]:
    def read(response: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
        return tuple(
            Model(m.name, m.max_model_len, m.vocab_size, m.dtype, m.has_chat_template) for m in response.models
        )

    return Unary(lambda stubs: stubs.inference.ListModels, inference_pb2.ListModelsRequest(), read)


def abort(request_id: str) -> Unary[bool]:
    request = inference_pb2.AbortRequest(request_id=request_id)
    return Unary(lambda stubs: stubs.inference.Abort, request, lambda response: bool(response.found))


def server_info() -> Unary[ServerInfo]:
    def read(r: control_pb2.GetServerInfoResponse) -> ServerInfo:
        return ServerInfo(r.service, r.version, r.instance, r.uptime_ms, r.draining, tuple(r.models))

    return Unary(lambda stubs: stubs.control.GetServerInfo, control_pb2.GetServerInfoRequest(), read)


def load() -> Unary[Load]:
    def read(response: control_pb2.GetLoadResponse) -> Load:
        groups = tuple(msgspec.convert(group, GroupLoad, from_attributes=True) for group in response.groups)
        return Load(groups, response.requests_in_flight)

    return Unary(lambda stubs: stubs.control.GetLoad, control_pb2.GetLoadRequest(), read)


def traces(limit: int, request_id: str) -> Unary[tuple[Trace, ...]]:
    def read(response: control_pb2.ListTracesResponse) -> tuple[Trace, ...]:
        return tuple(
            Trace(
                request_id=trace.request_id,
                trace_id=trace.trace_id,
                arrived_unix_ns=trace.arrived_unix_ns,
                spans=tuple(_trace_span(span) for span in trace.spans),
            )
            for trace in response.traces
        )

    request = control_pb2.ListTracesRequest(limit=limit, request_id=request_id)
    return Unary(lambda stubs: stubs.control.ListTraces, request, read)


def drain(drain_timeout_ms: int) -> Unary[int]:
    request = control_pb2.DrainRequest(timeout_ms=drain_timeout_ms)
    return Unary(lambda stubs: stubs.control.Drain, request, lambda response: int(response.requests_in_flight))


def _trace_span(span: control_pb2.TraceSpan) -> TraceSpan:
    facts = {name: getattr(span, name) for name in TraceSpan.__struct_fields__}
    return TraceSpan(**facts | {"attributes": dict(span.attributes)})


def to_wire(request: Request) -> inference_pb2.GenerateRequest:
    """Raises FieldError."""
    _check_one_input(request)
    wire = inference_pb2.GenerateRequest()
    _set(wire, request, ("request_id", "model", "priority", "prompt", "deterministic", "cache_salt"))
    if request.token_ids is not None:
        wire.token_ids.SetInParent()
        with _naming("token_ids"):
            wire.token_ids.ids.extend(request.token_ids)
    if request.messages is not None:
        _set(wire.chat, request, ("tools_json", "template_kwargs_json"))
        with _naming("messages"):
            for message in request.messages:
                wire.chat.messages.add(role=message.role, content=message.content)
    _set(wire.sampling, request, SAMPLING)
    with _naming("logit_bias"):
        wire.sampling.logit_bias.update(request.logit_bias)
    _set(wire.stopping, request, STOPPING)
    with _naming("stop"):
        wire.stopping.stop.extend(request.stop)
    with _naming("stop_token_ids"):
        wire.stopping.stop_token_ids.extend(request.stop_token_ids)
    _set(wire.response, request, RESPONSE)
    if request.structured is not None:
        _set_structured(wire.structured, *request.structured)
    return wire


def _check_one_input(request: Request) -> None:
    """The wire holds one and would drop the others. A request with none is the server's to refuse."""
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(request, name) is not None]
    if len(given) > 1:
        raise FieldError(given[1], ValueError(f"{given[0]} is given too, and a request has one of them"))


def _set_structured(wire: inference_pb2.Structured, kind: str, value: str | tuple[str, ...]) -> None:
    with _naming(kind):
        if kind == "json_object":
            wire.json_object = True
        elif kind == "choice":
            wire.choice.options.extend(value)
            wire.choice.SetInParent()
        else:
            setattr(wire, kind, value)


@contextlib.contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise FieldError(field, error) from None


SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
)
STOPPING = ("max_tokens", "min_tokens", "ignore_eos")
RESPONSE = ("logprobs", "prompt_logprobs", "include_timing")


def _set(wire: Any, request: Request, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(request, name)
        if value is not None:
            with _naming(name):
                setattr(wire, name, value)


def from_wire(response: inference_pb2.GenerateResponse) -> Event | None:
    match response.WhichOneof("event"):
        case "accepted":
            a = response.accepted
            return Accepted(a.request_id, a.prompt_tokens, a.seed, _logprobs(a.prompt_logprobs))
        case "delta":
            d = response.delta
            return Delta(d.index, d.text, tuple(d.token_ids), _logprobs(d.logprobs))
        case "finished":
            return _finished(response.finished)
    return None


def _logprobs(entries: Any) -> tuple[Logprobs, ...]:
    return tuple(
        Logprobs(e.token_id, e.logprob, e.rank, tuple(TopLogprob(t.token_id, t.logprob, t.token) for t in e.top))
        for e in entries
    )


def _finished(finished: inference_pb2.Finished) -> Finished:
    reason = inference_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    match = finished.stop_match.WhichOneof("match")
    usage = timing = None
    if finished.HasField("usage"):
        u = finished.usage
        usage = Usage(u.prompt_tokens, u.completion_tokens, u.cached_tokens)
    if finished.HasField("timing"):
        durations = {name: getattr(finished.timing, name) for name in Timing.__struct_fields__}
        timing = Timing(**durations | {"queue_reason_ns": dict(finished.timing.queue_reason_ns)})
    return Finished(finished.index, reason, getattr(finished.stop_match, match) if match else None, usage, timing)


def metadata_of(api_key: str) -> Metadata:
    """What a call brings along for its key."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def credentials_of(tls: Tls) -> grpc.ChannelCredentials:
    """The files of a client as gRPC takes them. Raises ConfigError for those that cannot be used."""
    tls.check()
    authorities = tls.ssl_ca_certs or ssl.get_default_verify_paths().cafile or ""
    files = (authorities, tls.ssl_keyfile, tls.ssl_certfile)
    return grpc.ssl_channel_credentials(*(content(file) if file else None for file in files))


def nobody_at(address: str, tls: Tls | None) -> CallError:
    if tls is None:
        said = (
            f"nothing answers gRPC at {address}; is `sluice up` running, and is this its --grpc-port, not HTTP's? "
            "A router with TLS is called with --tls"
        )
    else:
        said = (
            f"nothing that we trust, and that trusts us, answers by TLS at {address}: is `sluice up` running with TLS, "
            "is its certificate for this host and of --ssl-ca-certs, does it ask for one of ours (--ssl-certfile)?"
        )
    return CallError("UNAVAILABLE", said)


def call_error(error: Any) -> CallError:
    """The status with its details unpacked. One that the channel made itself has none."""
    field, retry_after_ms = "", 0
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        violation, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(violation) and violation.field_violations:
            field = violation.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_ms = _milliseconds(retry.retry_delay)
    said = error.details() or ""
    return CallError(error.code().name, said if status else plainly(said), field=field, retry_after_ms=retry_after_ms)


CHANNEL_SAYS = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not of an authority that --ssl-ca-certs names",
    "Hostname Verification Check failed": "the server's certificate is not for the host of the address",
    "connect an http1.x server": "that is an HTTP port; this client calls the gRPC one (--grpc-port, 50051)",
    "failed to connect": "nothing answers there; is `sluice up` running?",
    "Deadline Exceeded": "the deadline passed before the answer was complete",
    "Stream removed": "the connection broke off before the answer was complete",
    "Socket closed": "the connection broke off before the answer was complete",
    "Connection reset": "the connection broke off before the answer was complete",
    "Received message larger than max": "the message is larger than the server takes (its --max-request-bytes)",
}
"""gRPC's own words for what a channel met, and ours; the first that fit are said."""


def plainly(details: str) -> str:
    """A channel's words as ours, where we have any."""
    return next((plain for words, plain in CHANNEL_SAYS.items() if words in details), details)


def _milliseconds(duration: Duration) -> int:
    return int(duration.ToMilliseconds())
