"""A small typed client over the generated stubs: values in, values out, no protobuf beyond this file."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from shared.rpc.sluice.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Message(msgspec.Struct, frozen=True):
    """One chat message."""

    role: str
    content: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request; None is unset and leaves the choice to the server. Exactly one of prompt, token_ids, messages."""

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    template_kwargs_json: str = ""
    tools_json: str = ""
    request_id: str = ""
    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_timing: bool = False
    priority: int = 0
    deterministic: bool | None = None
    structured: tuple[str, str | tuple[str, ...]] | None = None
    """What the answer must look like: a field of Structured in inference.proto and its value (a text, the options of
    "choice", nothing for "json_object")."""


class TopLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    token: bytes


class Logprobs(msgspec.Struct, frozen=True):
    """Of one token: raw log-probability, rank (1 is best), the best alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...] = ()


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Comes more than once only where the logprobs of a long prompt go on in the next."""

    request_id: str
    prompt_tokens: int
    seed: int
    prompt_logprobs: tuple[Logprobs, ...] = ()


class Delta(msgspec.Struct, frozen=True, tag=True):
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in nanoseconds, as in inference.proto."""

    total_ns: int
    admit_ns: int
    tokenize_ns: int
    route_ns: int
    schedule_ns: int
    link_ns: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    deliver_ns: int
    time_to_first_token_ns: int
    preemptions: int
    queue_reason_ns: dict[str, int]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """`reason` is stop, length, abort or error; `stop_match` the stop string or token id that ended the sample."""

    index: int
    reason: str
    stop_match: str | int | None = None
    usage: Usage | None = None
    timing: Timing | None = None


Event = Accepted | Delta | Finished


class Model(msgspec.Struct, frozen=True):
    name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    has_chat_template: bool


class ServerInfo(msgspec.Struct, frozen=True):
    service: str
    version: str
    instance: str
    uptime_ms: int
    draining: bool
    models: tuple[str, ...]


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One worker group's requests and KV blocks; free + cached + referenced = total."""

    scheduler: str
    group: str
    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_referenced: int


class Load(msgspec.Struct, frozen=True):
    groups: tuple[GroupLoad, ...]
    requests_in_flight: int


class TraceSpan(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a request's life; `parent` is the index of the one that it is a part of, -1 for none."""

    name: str
    service: str
    instance: str
    parent: int
    start_ns: int
    duration_ns: int
    attributes: Mapping[str, str]
    error: str


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a finished request's time went. The first span is the whole of it."""

    request_id: str
    trace_id: str
    arrived_unix_ns: int
    spans: tuple[TraceSpan, ...]


class CallError(Exception):
    """A call that did not end with OK. `status` is the name of a grpc.StatusCode; `field` and `retry_after_ms` come
    from the status' details, where it has any."""

    def __init__(self, status: str, message: str, *, field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(f"{status}: {message}" if message else status)
        self.status = status
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class FieldError(ValueError):
    """A value that its field of a request cannot hold. `field` is the field's name in Request."""

    def __init__(self, field: str, why: Exception) -> None:
        super().__init__(f"{field} does not fit its field: {why}")
        self.field = field
        self.why = str(why)


class Client:
    """One channel to one router (or, for the control calls, a scheduler). An async context manager."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def connect(self, timeout_s: float) -> None:
        """Waits until the server answers. Raises CallError UNAVAILABLE."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            raise CallError("UNAVAILABLE", f"nothing answers at {self.address}; is `sluice up` running?") from None

    async def generate(
        self, request: Request, *, timeout_s: float | None = None, metadata: tuple[tuple[str, str], ...] = ()
    ) -> AsyncIterator[Event]:
        """The request's events. Leaving the iteration cancels the call, which frees what it holds on the server.

        Raises CallError, and FieldError before anything is sent.
        """
        call = self._inference.Generate(_to_wire(request), timeout=timeout_s, metadata=metadata)
        try:
            async for response in call:
                event = _from_wire(response)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise _call_error(error) from None
        finally:
            call.cancel()

    async def list_models(self, *, timeout_s: float = 10.0) -> tuple[Model, ...]:
        response = await self._call(self._inference.ListModels, inference_pb2.ListModelsRequest(), timeout_s)
        return tuple(
            Model(m.name, m.max_model_len, m.vocab_size, m.dtype, m.has_chat_template) for m in response.models
        )

    async def abort(self, request_id: str, *, timeout_s: float = 10.0) -> bool:
        """Ends a live request; False when the server knows none of that id."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        return bool((await self._call(self._inference.Abort, request, timeout_s)).found)

    async def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        r = await self._call(self._control.GetServerInfo, control_pb2.GetServerInfoRequest(), timeout_s)
        return ServerInfo(r.service, r.version, r.instance, r.uptime_ms, r.draining, tuple(r.models))

    async def load(self, *, timeout_s: float = 10.0) -> Load:
        response = await self._call(self._control.GetLoad, control_pb2.GetLoadRequest(), timeout_s)
        groups = tuple(
            GroupLoad(**{name: getattr(group, name) for name in GroupLoad.__struct_fields__})
            for group in response.groups
        )
        return Load(groups, response.requests_in_flight)

    async def traces(self, limit: int, request_id: str = "", *, timeout_s: float = 10.0) -> tuple[Trace, ...]:
        """Of the last finished requests, the newest first; of one where it is named by its id or its trace's."""
        request = control_pb2.ListTracesRequest(limit=limit, request_id=request_id)
        response = await self._call(self._control.ListTraces, request, timeout_s)
        return tuple(
            Trace(
                request_id=trace.request_id,
                trace_id=trace.trace_id,
                arrived_unix_ns=trace.arrived_unix_ns,
                spans=tuple(_trace_span(span) for span in trace.spans),
            )
            for trace in response.traces
        )

    async def drain(self, *, drain_timeout_ms: int = 0, timeout_s: float = 10.0) -> int:
        """Asks the service to finish and exit; returns how many requests it still holds."""
        request = control_pb2.DrainRequest(timeout_ms=drain_timeout_ms)
        return int((await self._call(self._control.Drain, request, timeout_s)).requests_in_flight)

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _call_error(error) from None


def _trace_span(span: control_pb2.TraceSpan) -> TraceSpan:
    facts = {name: getattr(span, name) for name in TraceSpan.__struct_fields__}
    return TraceSpan(**facts | {"attributes": dict(span.attributes)})


def _to_wire(request: Request) -> inference_pb2.GenerateRequest:
    """Raises FieldError."""
    wire = inference_pb2.GenerateRequest()
    _set(wire, request, ("request_id", "model", "priority", "prompt", "deterministic"))
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


def _from_wire(response: inference_pb2.GenerateResponse) -> Event | None:
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


def _call_error(error: grpc.aio.AioRpcError) -> CallError:
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
    return CallError(error.code().name, said if status else _plainly(said), field=field, retry_after_ms=retry_after_ms)


CHANNEL_SAYS = {
    "failed to connect": "nothing answers there; is `sluice up` running?",
    "Stream removed": "the connection broke off before the answer was complete",
    "Socket closed": "the connection broke off before the answer was complete",
    "Connection reset": "the connection broke off before the answer was complete",
    "Received message larger than max": "the message is larger than the server takes (its --max-request-bytes)",
}
"""gRPC's own words for what a channel met, and ours."""


def _plainly(details: str) -> str:
    return next((plain for words, plain in CHANNEL_SAYS.items() if words in details), details)


def _milliseconds(duration: Duration) -> int:
    return int(duration.ToMilliseconds())
