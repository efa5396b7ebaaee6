"""A scheduler service in this process, pretend workers beside it, and a router's end of a link."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from services.scheduler.app import serve
from services.worker.host import host
from shared import PROTOCOL_VERSION
from shared.config import SchedulerConfig, WorkerConfig
from shared.ids import new_instance_id
from shared.rpc.sluice.v1 import control_pb2, control_pb2_grpc
from shared.rpc.sluice.v1 import scheduling_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2_grpc as rpc
from tests.builders.pretend_worker import PretendRunner, pretend_loaded

TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def running_scheduler(**config: Any) -> AsyncIterator[str]:
    """A scheduler on a free port unless one is given, drained at the end; yields its address."""
    ready: asyncio.Queue[str] = asyncio.Queue()
    settings = SchedulerConfig(
        **{"port": 0, "metrics_port": 0, "shutdown_timeout": 0.5, "check_invariants": True, **config}
    )
    task = asyncio.create_task(serve(settings, on_event=lambda name, fields: ready.put_nowait(fields["address"])))
    try:
        address = await asyncio.wait_for(ready.get(), TIMEOUT_S)
        yield address
        async with grpc.aio.insecure_channel(address) as channel:
            await control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest(timeout_ms=200))
        assert await asyncio.wait_for(task, TIMEOUT_S) == 0
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def running_worker(scheduler: str, **runner: Any) -> AsyncIterator[PretendRunner]:
    """A pretend worker, registered; its runner. Cancelled at the end."""
    pretend = PretendRunner(**runner)
    ready = asyncio.Event()

    def on_event(name: str, fields: dict[str, Any]) -> None:
        if name == "ready":
            ready.set()

    config = WorkerConfig(port=0, metrics_port=0, scheduler=scheduler)
    instance = new_instance_id("worker")
    task = asyncio.create_task(
        host(config, lambda progress: pretend_loaded(pretend), instance=instance, on_event=on_event)
    )
    try:
        await asyncio.wait_for(ready.wait(), TIMEOUT_S)
        yield pretend
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass
class Heard:
    """What came for one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt_logprobs: int = 0
    ends: dict[int, pb.SampleEnd] = field(default_factory=dict)
    released: pb.Released | None = None


@dataclass
class LinkClient:
    """A router's end. `heard` collects by key; `state` and `loads` are the latest."""

    call: Any
    outbox: "asyncio.Queue[pb.RouterFrame | None]"
    heard: dict[int, Heard] = field(default_factory=dict)
    state: pb.SchedulerState | None = None
    loads: list[pb.LinkLoad] = field(default_factory=list)
    warm: set[bytes] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, key: int, token_ids: Sequence[int], *, more: bool = False, **fields: Any) -> None:
        self.outbox.put_nowait(pb.RouterFrame(submits=[submit_message(key, token_ids, more=more, **fields)]))

    def abort(self, key: int, index: int = -1, cause: int = pb.ABORT_CAUSE_CLIENT) -> None:
        self.outbox.put_nowait(pb.RouterFrame(aborts=[pb.LinkAbort(key=key, index=index, cause=cause)]))

    async def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def released(self, *keys: int, timeout_s: float = TIMEOUT_S) -> list[pb.Released]:
        await self.until(lambda: all(k in self.heard and self.heard[k].released for k in keys), timeout_s)
        return [self.heard[key].released for key in keys]  # type: ignore[misc]

    def take(self, frame: pb.SchedulerFrame) -> None:
        if frame.HasField("state"):
            self.state = frame.state
        if frame.HasField("loads"):
            self.loads = list(frame.loads.groups)
        self.warm -= {frame.blocks_removed[i : i + 8] for i in range(0, len(frame.blocks_removed), 8)}
        self.warm |= {frame.blocks_stored[i : i + 8] for i in range(0, len(frame.blocks_stored), 8)}
        for event in frame.tokens:
            heard = self.heard.setdefault(event.key, Heard())
            ids = [int.from_bytes(event.token_ids[i : i + 4], "little") for i in range(0, len(event.token_ids), 4)]
            heard.tokens.setdefault(event.index, []).extend(ids)
            heard.prompt_logprobs += len(event.prompt_logprobs)
        for key, index, token_id in struct.iter_unpack("<QII", frame.plain_tokens):
            self.heard.setdefault(key, Heard()).tokens.setdefault(index, []).append(token_id)
        for end in frame.ends:
            self.heard.setdefault(end.key, Heard()).ends[end.index] = end
        for released in frame.released:
            self.heard.setdefault(released.key, Heard()).released = released
        self.changed.set()


def submit_message(key: int, token_ids: Sequence[int], *, more: bool = False, **fields: Any) -> pb.Submit:
    """A greedy request unless `fields` say otherwise."""
    packed = b"".join(token.to_bytes(4, "little") for token in token_ids)
    sampling = pb.RowSampling(temperature=0, top_p=1, repetition_penalty=1, seed=fields.pop("seed", 1))
    settings = {"n": 1, "max_tokens": 5, "logprobs": -1, "prompt_logprobs": -1, **fields}
    return pb.Submit(key=key, token_ids=packed, more=more, sampling=sampling, **settings)


@contextlib.asynccontextmanager
async def linked(scheduler: str, *, workers: int = 1, version: int = PROTOCOL_VERSION) -> AsyncIterator[LinkClient]:
    """A link whose first frame has come, and so many workers with it; half-closed at the end."""
    outbox: asyncio.Queue[pb.RouterFrame | None] = asyncio.Queue()
    outbox.put_nowait(pb.RouterFrame(hello=pb.LinkHello(protocol_version=version, router="router-test")))

    async def outgoing() -> AsyncIterator[pb.RouterFrame]:
        while (frame := await outbox.get()) is not None:
            yield frame

    async with grpc.aio.insecure_channel(scheduler) as channel:
        call = rpc.SchedulingStub(channel).Link(outgoing())
        client = LinkClient(call, outbox)

        async def read() -> None:
            async for frame in call:
                client.take(frame)

        reader = asyncio.create_task(read())
        try:
            await asyncio.wait(
                {reader, asyncio.create_task(client.until(lambda: client.state is not None))},
                return_when=asyncio.FIRST_COMPLETED,
                timeout=TIMEOUT_S,
            )
            if reader.done():
                await reader
            await client.until(lambda: len(client.loads) >= workers)
            yield client
            outbox.put_nowait(None)
            await asyncio.wait_for(reader, TIMEOUT_S)
        finally:
            call.cancel()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
