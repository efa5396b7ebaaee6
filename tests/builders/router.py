"""A router in this process, on a port of its own, in front of fake schedulers."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.router.app import Router
from services.router.model import load_model
from services.router.peers import PeerPlace
from shared.config import RouterConfig
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1.control_pb2_grpc import ControlStub
from shared.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from tests.builders.fake_scheduler import FakeScheduler


def run(test: Coroutine[Any, Any, None], timeout_s: float = 60) -> None:
    """Runs an asynchronous test."""

    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await test
        gc.collect()  # a grpc server freed after its loop has closed complains

    asyncio.run(bounded())


@dataclass
class RunningRouter:
    """What a test needs of it."""

    router: Router
    address: str
    channel: grpc.aio.Channel
    events: list[tuple[str, dict[str, Any]]]
    serving: asyncio.Task[int]

    @property
    def http(self) -> str:
        return self.events[0][1]["http"]

    @property
    def inference(self) -> InferenceStub:
        return InferenceStub(self.channel)

    @property
    def control(self) -> ControlStub:
        return ControlStub(self.channel)

    async def generate(self, request: pb.GenerateRequest, **call: Any) -> list[pb.GenerateResponse]:
        """All responses; raises AioRpcError."""
        call.setdefault("timeout", 20)
        return [response async for response in self.inference.Generate(request, **call)]

    async def usable(self, number: int = 1) -> None:
        """Waits until so many schedulers may be used."""
        await until(lambda: self.router.fleet.num_usable == number)

    async def idle(self) -> None:
        """Waits until nothing is in flight and every scheduler has released every request."""
        fleet, admission = self.router.fleet, self.router.admission
        await until(lambda: not len(admission) and not any(link.num_entries for link in fleet.links))


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Waits for a condition that nobody announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def rest(call: Any) -> list[pb.GenerateResponse]:
    """What is left of a call that was read from; raises AioRpcError."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def drained(call: Any) -> tuple[list[pb.GenerateResponse], grpc.aio.AioRpcError]:
    """What is left of a call that ends badly, and how it ends."""
    responses = []
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
    except grpc.aio.AioRpcError as error:
        return responses, error
    raise AssertionError("the call ended well")


def refusal(error: grpc.aio.AioRpcError) -> tuple[str, str, float]:
    """(status name, field named in BadRequest, seconds of RetryInfo) of a failed call."""
    field, retry_s = "", 0.0
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            field = bad.field_violations[0].field
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToTimedelta().total_seconds()
    return error.code().name, field, retry_s


@asynccontextmanager
async def running_router(
    model: Path,
    *schedulers: FakeScheduler,
    usable: int | None = None,
    place: PeerPlace | None = None,
    **settings: Any,
) -> AsyncIterator[RunningRouter]:
    """Starts the schedulers and the router; stops both, and lets a failure of the router fail the test."""
    for scheduler in schedulers:
        await scheduler.start()
    settings.setdefault("scheduler", tuple(scheduler.address for scheduler in schedulers) or ("127.0.0.1:1",))
    config = RouterConfig(model=str(model), grpc_port=0, port=0, **settings)
    events: list[tuple[str, dict[str, Any]]] = []
    served: asyncio.Event = asyncio.Event()

    def on_event(name: str, data: dict[str, Any]) -> None:
        events.append((name, data))
        served.set()

    router = Router(config, load_model(config), "router-test", on_event, place)
    serving = asyncio.create_task(router.serve())
    await served.wait()
    address = events[0][1]["grpc"]
    channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    running = RunningRouter(router, address, channel, events, serving)
    try:
        await running.usable(len(schedulers) if usable is None else usable)
        yield running
    finally:
        await channel.close()
        router.stop()
        await serving
        for scheduler in schedulers:
            await scheduler.stop()


def texts(responses: list[pb.GenerateResponse]) -> dict[int, str]:
    """Each sample's text."""
    found: dict[int, str] = {}
    for response in responses:
        if response.WhichOneof("event") == "delta":
            found[response.delta.index] = found.get(response.delta.index, "") + response.delta.text
    return found


def ids(responses: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    """One sample's token ids."""
    deltas = (one.delta for one in responses if one.WhichOneof("event") == "delta")
    return [token_id for delta in deltas if delta.index == index for token_id in delta.token_ids]


def ends(responses: list[pb.GenerateResponse]) -> list[pb.Finished]:
    """Every Finished, in order."""
    return [response.finished for response in responses if response.WhichOneof("event") == "finished"]
