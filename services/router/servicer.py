"""The gRPC door: messages in, messages out, and nothing that decides."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TypeAlias

import grpc
import msgspec

from services.router import wire
from services.router.admission import Admission
from services.router.fleet import Fleet
from services.router.gate import Gate, Key
from services.router.guard import AUTHORIZATION
from services.router.model import ServedModel
from services.router.peers import Peers
from services.router.rejections import Rejections
from services.router.request import Accepted, Event, GenerateOptions, Prompt
from services.router.session import Session
from services.router.traces import Traces
from shared import __version__
from shared.clock import NS_PER_MS, NowNs
from shared.net.deadlines import remaining_ns
from shared.net.peers import require_local
from shared.outcome import AbortCause, RefusedError, refuse
from shared.rpc.sluice.v1 import control_pb2, inference_pb2
from shared.rpc.sluice.v1.control_pb2_grpc import ControlServicer, add_ControlServicer_to_server
from shared.rpc.sluice.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from shared.telemetry import context as trace_context

REQUEST_ID_HEADER = "x-request-id"
DEFAULT_TRACES = 20

Context: TypeAlias = grpc.aio.ServicerContext


class RouterInference(InferenceServicer):
    """Inference of inference.proto."""

    def __init__(
        self,
        *,
        model: ServedModel,
        session: Session,
        fleet: Fleet,
        admission: Admission,
        gate: Gate,
        rejections: Rejections,
        peers: Peers,
        max_request_bytes: int,
        stall_timeout_ms: int,
    ) -> None:
        self._model = model
        self._peers = peers
        self._session = session
        self._fleet = fleet
        self._admission = admission
        self._gate = gate
        self._rejections = rejections
        self._max_request_bytes = max_request_bytes
        self._stall_timeout_s = stall_timeout_ms / 1000

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """One request. What waits in here keeps little: a router holds thousands of them."""
        request_id = ""
        try:
            request_id = wire.request_id_of(request, _header(context, REQUEST_ID_HEADER))
            prompt, options = self._understand(request, request_id, context)
        except RefusedError as error:
            self._rejections.reject(error.refusal, request_id=request_id, door="grpc")
            raise
        del request
        try:
            await self._answer(prompt, options, context)
        except grpc.aio.InternalError:  # what a write comes to that was blocked when its call ended
            raise refuse("cancelled", "the client is gone") from None

    def _understand(
        self, request: inference_pb2.GenerateRequest, request_id: str, context: Context
    ) -> tuple[Prompt, GenerateOptions]:
        """What the message asks for. Raises RefusedError for what does not fit."""
        deadline_ns = remaining_ns(context)
        context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))  # for a refusal, which has no headers
        if request.model:
            self._model.check_name(request.model)
        length = self._fleet.max_model_len or self._model.max_model_len
        key = self._key(context)
        max_bytes = key.largest(self._max_request_bytes)
        prompt = wire.prompt_of(request, self._model, max_bytes=max_bytes, max_model_len=length)
        caller = trace_context.parse(_header(context, trace_context.PARENT), _header(context, trace_context.STATE))
        return prompt, wire.options_of(request, self._model, request_id, deadline_ns, caller, key)

    def _key(self, context: Context) -> Key:
        """The interceptor has let it in."""
        return self._gate.key_of(_header(context, AUTHORIZATION))

    async def _answer(self, prompt: Prompt, options: GenerateOptions, context: Context) -> None:
        """Writes through the context rather than by yielding: only so is a blocked write ours to time."""
        async with aclosing(self._session.run(prompt, options)) as events:
            async for event in events:
                await self._tell(event, options, context)

    async def _tell(self, event: Event, options: GenerateOptions, context: Context) -> None:
        if isinstance(event, Accepted):  # not before: a refusal without headers may be retried by gRPC itself
            await context.send_initial_metadata(((REQUEST_ID_HEADER, options.request_id),))
        for response in wire.responses_of(event):
            await self._write(response, options, context)

    async def _write(
        self, response: inference_pb2.GenerateResponse, options: GenerateOptions, context: Context
    ) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await context.write(response)
        except TimeoutError:
            self._admission.abort(options.request_id, AbortCause.STALLED, options.key)
            seconds = f"{self._stall_timeout_s:g} s"
            raise refuse("client_stalled", f"the client read nothing for {seconds}; the answer was ended") from None

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        model = self._model
        length = self._fleet.max_model_len or model.max_model_len
        dtype = self._fleet.dtype or model.dtype
        chat = model.chat_template is not None
        models = [
            inference_pb2.Model(
                name=name, max_model_len=length, vocab_size=model.vocab_size, dtype=dtype, has_chat_template=chat
            )
            for name in model.names
        ]
        return inference_pb2.ListModelsResponse(models=models)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Context) -> inference_pb2.AbortResponse:
        key = self._key(context)
        found = self._admission.abort(request.request_id, AbortCause.CLIENT, key)
        found = found or await self._peers.abort(request.request_id, key.tenant)
        return inference_pb2.AbortResponse(found=found)


class RouterControl(ControlServicer):
    """Control of control.proto."""

    def __init__(
        self,
        *,
        model: ServedModel,
        fleet: Fleet,
        admission: Admission,
        traces: Traces,
        instance: str,
        peers: Peers,
        drain: Callable[[float | None], Awaitable[None]],
        now: NowNs,
    ) -> None:
        self._model = model
        self._peers = peers
        self._fleet = fleet
        self._admission = admission
        self._traces = traces
        self._instance = instance
        self._drain = drain
        self._now = now
        self._started_ns = now()

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        return control_pb2.GetServerInfoResponse(
            service="router",
            version=__version__,
            instance=self._instance,
            uptime_ms=(self._now() - self._started_ns) // NS_PER_MS,
            draining=self._admission.draining,
            models=self._model.names,
        )

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: Context) -> control_pb2.GetLoadResponse:
        groups = [
            control_pb2.GroupLoad(scheduler=scheduler, **msgspec.structs.asdict(load))
            for scheduler, load in self._fleet.loads()
        ]
        in_flight = len(self._admission) + await self._peers.requests_in_flight()
        return control_pb2.GetLoadResponse(groups=groups, requests_in_flight=in_flight)

    async def ListTraces(
        self, request: control_pb2.ListTracesRequest, context: Context
    ) -> control_pb2.ListTracesResponse:
        limit = request.limit or DEFAULT_TRACES
        own = [wire.trace_message(trace) for trace in self._traces.latest(limit, request.request_id)]
        found = own + await self._peers.traces(limit, request.request_id)
        found.sort(key=_ended_ns, reverse=True)
        return control_pb2.ListTracesResponse(traces=found[:limit])

    async def Drain(self, request: control_pb2.DrainRequest, context: Context) -> control_pb2.DrainResponse:
        require_local(context, "Control.Drain", "call it there, or send the router SIGTERM")
        elsewhere = await self._peers.drain(request.timeout_ms)
        await self._drain(request.timeout_ms / 1000 if request.timeout_ms else None)
        return control_pb2.DrainResponse(requests_in_flight=len(self._admission) + elsewhere)


def add_servicers(server: grpc.aio.Server, inference: RouterInference, control: RouterControl) -> None:
    """Puts both on a server that is not started yet."""
    add_InferenceServicer_to_server(inference, server)
    add_ControlServicer_to_server(control, server)


def _ended_ns(trace: control_pb2.Trace) -> int:
    return trace.arrived_unix_ns + max(span.start_ns + span.duration_ns for span in trace.spans)


def _header(context: Context, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return str(value)
    return ""
