"""A pretend router for the client's tests: answers Generate from a script and keeps what it was asked."""

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc

from shared.net.errors import GuardInterceptor
from shared.net.options import server_options
from shared.outcome import RefusedError, refuse
from shared.rpc.sluice.v1 import control_pb2 as control
from shared.rpc.sluice.v1 import control_pb2_grpc, inference_pb2_grpc
from shared.rpc.sluice.v1 import inference_pb2 as pb

TIMING = pb.Timing(
    total_ns=100_000_000,
    admit_ns=1_000_000,
    tokenize_ns=2_000_000,
    route_ns=1_000_000,
    schedule_ns=95_000_000,
    link_ns=1_000_000,
    queue_ns=4_000_000,
    prefill_ns=30_000_000,
    decode_ns=60_000_000,
    deliver_ns=1_000_000,
    time_to_first_token_ns=39_000_000,
    preemptions=1,
    queue_reason_ns={"blocks": 4_000_000},
)


LOGPROBS = pb.Logprobs(token_id=9, logprob=-0.5, rank=1)


class FakeRouter(inference_pb2_grpc.InferenceServicer, control_pb2_grpc.ControlServicer):
    """Says the words of `answer`, each sample in turn. A prompt `refuse` is refused, `hang` never ends, `break` ends
    with an error after the words; `busy` is refused as often as `busy` says, `lost` ends so after Accepted."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = 0
        self.busy = 0
        self.retry_after_ms = 50
        """Said to a prompt `busy`."""
        self.answer = ("Hello", ", ", "wörld")
        self._has_chat_template = has_chat_template

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        whole = False
        try:
            async for response in self._answer(request):
                yield response
            whole = True
        except RefusedError:
            whole = True
            raise
        finally:
            self.cancelled += not whole

    async def _answer(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.prompt == "refuse":
            raise refuse("queue_full", "512 requests are waiting", retry_after_ms=100)
        if request.prompt == "busy" and self.busy:
            self.busy -= 1
            raise refuse("queue_full", "512 requests are waiting", retry_after_ms=self.retry_after_ms)
        if request.sampling.top_p > 1:
            raise refuse("invalid_argument", "top_p is at most 1", field="sampling.top_p")
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="req-1", prompt_tokens=4, seed=7))
        if request.prompt == "lost" and self.busy:
            self.busy -= 1
            yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_ERROR))
            raise refuse("no_worker", "no worker is left", retry_after_ms=50)
        samples = request.sampling.n or 1
        for i in range(samples):
            for word in self.answer:
                logprobs = (
                    [pb.Logprobs(token_id=9, logprob=-0.5, rank=1)] if request.response.HasField("logprobs") else []
                )
                yield pb.GenerateResponse(delta=pb.Delta(index=i, text=word, token_ids=[i], logprobs=logprobs))
            last = request.chat.messages[-1].content if request.chat.messages else request.prompt
            if last == "hang":
                await asyncio.sleep(60)
            if last == "break":
                raise refuse("queue_full", "it broke", retry_after_ms=50)
            finished = pb.Finished(index=i, reason=pb.FINISH_REASON_STOP, stop_match=pb.StopMatch(stop="."))
            if i == samples - 1:
                finished.usage.CopyFrom(pb.Usage(prompt_tokens=4, completion_tokens=3, cached_tokens=2))
                if request.response.include_timing:
                    finished.timing.CopyFrom(TIMING)
            yield pb.GenerateResponse(finished=finished)

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        model = pb.Model(
            name="twin", max_model_len=512, vocab_size=64, dtype="float32", has_chat_template=self._has_chat_template
        )
        return pb.ListModelsResponse(models=[model])

    async def Abort(self, request: pb.AbortRequest, context: object) -> pb.AbortResponse:
        return pb.AbortResponse(found=request.request_id == "req-1")

    async def GetServerInfo(self, request: object, context: object) -> control.GetServerInfoResponse:
        return control.GetServerInfoResponse(service="router", version="0", instance="router-1", models=["twin"])

    async def GetLoad(self, request: object, context: object) -> control.GetLoadResponse:
        group = control.GroupLoad(group="g", kv_blocks_total=10, kv_blocks_free=6, kv_blocks_cached=4)
        return control.GetLoadResponse(groups=[group], requests_in_flight=2)

    async def Drain(self, request: control.DrainRequest, context: object) -> control.DrainResponse:
        return control.DrainResponse(requests_in_flight=3)


async def serve(router: FakeRouter) -> tuple[grpc.aio.Server, str]:
    """A started server on a free port. The caller stops it."""
    server = grpc.aio.server(interceptors=[GuardInterceptor()], options=server_options(max_receive_bytes=2**20))
    inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
    control_pb2_grpc.add_ControlServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


class Served:
    """A pretend router on a thread of its own, for clients that are other processes."""

    def __init__(self, router: FakeRouter) -> None:
        self.router = router
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._done: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    async def _run(self) -> None:
        self._done = asyncio.Event()
        server, self.address = await serve(self.router)
        self._up.set()
        await self._done.wait()
        await server.stop(0)

    def __enter__(self) -> "Served":
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._done is not None
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)
        self._loop.close()
