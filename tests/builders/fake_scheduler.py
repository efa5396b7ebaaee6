"""A scheduler without a core: a scriptable Link server that answers in milliseconds."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc

from shared import PROTOCOL_VERSION
from shared.net.server import bind, create_server
from shared.rpc.sluice.v1 import scheduling_pb2 as pb
from shared.rpc.sluice.v1.scheduling_pb2_grpc import SchedulingServicer, add_SchedulingServicer_to_server

EVERY_SAMPLE = -1


def pack(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


@dataclass
class FakeRequest:
    """One submit as it arrived. A test that answers by hand calls `tokens`, `end` and `release`."""

    submit: pb.Submit
    token_ids: list[int]
    send: Callable[[pb.SchedulerFrame], None]
    ended: set[int] = field(default_factory=set)
    aborts: list[tuple[int, int]] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    released: bool = False

    @property
    def key(self) -> int:
        return self.submit.key

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    def tokens(self, token_ids: Sequence[int], index: int = 0, **fields: Any) -> None:
        """As a scheduler tells them: packed, unless logprobs come along."""
        if fields:
            event = pb.TokensEvent(key=self.key, index=index, token_ids=pack(token_ids), **fields)
            return self.send(pb.SchedulerFrame(tokens=[event]))
        plain = b"".join(struct.pack("<QII", self.key, index, token_id) for token_id in token_ids)
        self.send(pb.SchedulerFrame(plain_tokens=plain))

    def end(self, reason: str = "length", index: int = 0, stop_token_id: int = -1) -> None:
        self.ended.add(index)
        end = pb.SampleEnd(key=self.key, index=index, reason=reason, stop_token_id=stop_token_id)
        self.send(pb.SchedulerFrame(ends=[end]))

    def release(self, refusal: str = "", **fields: Any) -> None:
        self.released = True
        fields.setdefault("durations", pb.PhaseDurations(total_ns=60, queue_ns=10, prefill_ns=20, decode_ns=30))
        fields.setdefault("cached_tokens", 0 if refusal else 3)
        self.send(pb.SchedulerFrame(released=[pb.Released(key=self.key, refusal=refusal, **fields)]))


LONGEST_ECHO = 2048


def echo(request: FakeRequest, index: int) -> list[int]:
    """The prompt again and again, to the length asked for (16 where none was), or that a model would end at."""
    length = min(request.submit.max_tokens or 16, LONGEST_ECHO)
    prompt = request.token_ids
    return [prompt[(index + i) % len(prompt)] for i in range(length)]


class FakeScheduler(SchedulingServicer):
    """`answer` gives the tokens of each sample, one per step of `step_s`; None leaves every request to the test."""

    def __init__(
        self,
        *,
        answer: Callable[[FakeRequest, int], list[int]] | None = echo,
        step_s: float = 0.0,
        ack_delay_s: float = 0.0,
        **state: Any,
    ) -> None:
        self.answer = answer
        self.step_s = step_s
        self.ack_delay_s = ack_delay_s
        self.state = pb.SchedulerState(
            **{
                "protocol_version": PROTOCOL_VERSION,
                "scheduler": "scheduler-fake",
                "ready": True,
                "dtype": "float32",
                "block_size": 16,
                "max_model_len": 512,
                "vocab_size": 400,
                **state,
            }
        )
        self.warm = b""
        self.beat_s = 1.0
        self.hellos: list[pb.LinkHello] = []
        self.requests: list[FakeRequest] = []
        self.port = 0
        self._outboxes: list[asyncio.Queue[pb.SchedulerFrame]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """On a port of its own; a second start takes the same port again."""
        self._server = create_server(max_receive_bytes=16 * 2**20)
        add_SchedulingServicer_to_server(self, self._server)
        self.port = bind(self._server, "127.0.0.1", self.port)
        await self._server.start()

    async def stop(self) -> None:
        """Breaks every link at once, as a kill would."""
        if self._server is not None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.stop(None)
            self._server = None

    def send(self, frame: pb.SchedulerFrame) -> None:
        """To every router."""
        for outbox in self._outboxes:
            outbox.put_nowait(frame)

    def set_state(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.state, name, value)
        self.send(pb.SchedulerFrame(state=self.state))

    async def request(self, number: int = 0) -> FakeRequest:
        """The number-th request, once it has arrived."""
        async with asyncio.timeout(5):
            while len(self.requests) <= number:
                self._arrived.clear()
                await self._arrived.wait()
        return self.requests[number]

    async def Link(
        self, request_iterator: AsyncIterator[pb.RouterFrame], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SchedulerFrame]:
        outbox: asyncio.Queue[pb.SchedulerFrame] = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        self._outboxes.append(outbox)
        try:
            yield pb.SchedulerFrame(state=self.state, blocks_stored=self.warm)
            while True:
                try:
                    async with asyncio.timeout(self.beat_s):
                        frame = await outbox.get()
                except TimeoutError:
                    frame = pb.SchedulerFrame()
                yield frame
        finally:
            self._outboxes.remove(outbox)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, frames: AsyncIterator[pb.RouterFrame], outbox: asyncio.Queue[pb.SchedulerFrame]) -> None:
        live: dict[int, FakeRequest] = {}
        partial: dict[int, list[int]] = {}
        async for frame in frames:
            if frame.HasField("hello"):
                self.hellos.append(frame.hello)
            for submit in frame.submits:
                request = live.get(submit.key)
                if request is None:
                    request = live[submit.key] = FakeRequest(submit, [], outbox.put_nowait)
                    partial[submit.key] = request.token_ids
                request.token_ids.extend(unpack(submit.token_ids))
                if not submit.more:
                    self._take(request)
            for abort in frame.aborts:
                if abort.key in live:
                    self._abort(live[abort.key], abort.index, abort.cause)

    def _take(self, request: FakeRequest) -> None:
        self.requests.append(request)
        self._arrived.set()
        if self.answer is not None:
            self._spawn(self._answer(request))

    def _abort(self, request: FakeRequest, index: int, cause: int) -> None:
        request.aborts.append((index, cause))
        samples = range(request.submit.n) if index == EVERY_SAMPLE else [index]
        request.ended.update(samples)
        request.aborted.set()
        if self.answer is None and len(request.ended) == request.submit.n and not request.released:
            request.release()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: FakeRequest) -> None:
        assert self.answer is not None
        n = request.submit.n
        answers = [self.answer(request, index) for index in range(n)]
        for step in range(max(map(len, answers))):
            for index in range(n):
                if index not in request.ended:
                    self._step(request, index, answers[index], step)
            if len(request.ended) == n:
                break
            with suppress(TimeoutError):
                if self.step_s:
                    await asyncio.wait_for(request.aborted.wait(), self.step_s)
                else:
                    await asyncio.sleep(0)
        if self.ack_delay_s:
            await asyncio.sleep(self.ack_delay_s)
        request.release()

    def _step(self, request: FakeRequest, index: int, tokens: list[int], step: int) -> None:
        token = tokens[step]
        frame = pb.SchedulerFrame(tokens=[pb.TokensEvent(key=request.key, index=index, token_ids=pack([token]))])
        stops = token in unpack(request.submit.stop_token_ids)
        if stops or step == len(tokens) - 1:
            request.ended.add(index)
            reason = "stop" if stops else "length"
            frame.ends.add(key=request.key, index=index, reason=reason, stop_token_id=token if stops else -1)
        request.send(frame)
