"""One scheduler: the stream to it, the requests on it, and what it says of its load and of warm prefixes."""

import asyncio
import random
from dataclasses import dataclass, field

import grpc
import structlog

from services.router.fleet.frames import (
    PLAIN_TOKEN,
    hello_frame,
    load_of,
    logprobs_of,
    release_of,
    state_of,
    unpack_ids,
)
from services.router.fleet.outbox import EVERY_SAMPLE, Outbox
from services.router.fleet.values import Expected, Load, Release, Sink, State, Submission
from shared.ids import new_error_id
from shared.net.channel import internal_metadata, open_internal_channel
from shared.outcome import AbortCause, FinishReason, Refusal
from shared.prefix import BlockHash, short, unpack_short
from shared.rpc.sluice.v1 import scheduling_pb2 as pb
from shared.rpc.sluice.v1.scheduling_pb2_grpc import SchedulingStub

log = structlog.get_logger("fleet")

SILENCE_TIMEOUT_S = 5.0
"""A scheduler that is well says something every second."""
FIRST_FRAME_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
"""A scheduler that takes nothing for so long is lost."""
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0
LOST = Refusal(
    name="scheduler_lost", message="the connection to the scheduler broke; send the request again", retry_after_ms=500
)


class LinkBrokenError(Exception):
    """The stream ended, or does not follow the protocol."""


@dataclass(slots=True)
class _Entry:
    """A request that the scheduler has not released. `sink` is None once its session has ended."""

    n: int
    sink: Sink | None


@dataclass(slots=True)
class _View:
    """What the scheduler has told since the link was made."""

    state: State | None = None
    mismatch: str = ""
    loads: dict[str, Load] = field(default_factory=dict)
    warm: set[bytes] = field(default_factory=set)
    unseen: int = 0
    """Submits since the last load was told."""


class LinkTicket:
    """A request on a link. Outlives the stream: aborting a lost one does nothing."""

    __slots__ = ("_key", "_link")

    def __init__(self, link: "Link", key: int) -> None:
        self._link = link
        self._key = key

    def abort(self, index: int, cause: AbortCause) -> None:
        self._link._abort(self._key, index, cause)

    def forget(self) -> None:
        self._link._forget(self._key)


class Link:
    """Connects for as long as `run` runs. Entries stay until the scheduler releases them or the stream breaks."""

    def __init__(self, target: str, *, router: str, token: str, expected: Expected) -> None:
        self.target = target
        self._router = router
        self._token = token
        self._expected = expected
        self._view = _View()
        self._entries: dict[int, _Entry] = {}
        self._outbox = Outbox()
        self._next_key = 1
        self._complaint = ""
        self._changed = asyncio.Event()

    @property
    def state(self) -> State | None:
        return self._view.state

    @property
    def usable(self) -> bool:
        """Requests may be sent: connected, compatible, ready and not draining."""
        state = self._view.state
        return state is not None and state.ready and not state.draining and not self._view.mismatch

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    @property
    def unseen(self) -> int:
        return self._view.unseen

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(self._view.loads.values())

    def warm_tokens(self, chain: list[BlockHash]) -> int:
        """How many tokens of a prompt, from its start, are warm there: those up to the last block that is. The blocks
        before it are warm too, since leaves are evicted first; or no window sees them any more."""
        warm = self._view.warm
        count = next((place for place in range(len(chain), 0, -1) if short(chain[place - 1]) in warm), 0)
        return count * self._view.state.block_size if self._view.state else 0

    def submit(self, submission: Submission, sink: Sink) -> LinkTicket:
        """Hands the request over; its events go to `sink`. Raises RefusedError when the outbox is full."""
        key = self._next_key
        self._outbox.submit(key, submission)
        self._next_key += 1
        self._entries[key] = _Entry(submission.n, sink)
        self._view.unseen += 1
        return LinkTicket(self, key)

    def _abort(self, key: int, index: int, cause: AbortCause) -> None:
        if key in self._entries and not self._outbox.abort(key, index, cause):
            self._release(key, Release())

    def _forget(self, key: int) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            entry.sink = None

    async def wait_changed(self) -> None:
        """Until the scheduler's state changes or the link breaks."""
        self._changed.clear()
        await self._changed.wait()

    # The stream.

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._connect()
            except (grpc.aio.AioRpcError, LinkBrokenError, TimeoutError) as error:
                self._complain(_reason(error))
            except Exception as error:  # a bug: loud, and the link is made afresh
                log.error("link_failed", scheduler=self.target, error_id=new_error_id(), exc_info=error)
            finally:
                lived = self._lose()
            backoff_s = FIRST_BACKOFF_S if lived else min(LONGEST_BACKOFF_S, 2 * backoff_s)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _connect(self) -> None:
        channel = open_internal_channel(self.target)
        call = SchedulingStub(channel).Link(metadata=internal_metadata(self._token))
        writer = asyncio.create_task(self._write(call), name=f"link-writer {self.target}")
        try:
            await self._read(call)
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await channel.close()

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            await self._write_frame(call, hello_frame(self._router))
            while True:
                await self._outbox.wait()
                for frame in self._outbox.take():
                    await self._write_frame(call, frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            call.cancel()  # the reader ends too, and the link is made afresh
        except Exception as error:  # a bug: loud; without a writer the link would be silent for ever
            log.error("link_writer_failed", scheduler=self.target, error_id=new_error_id(), exc_info=error)
            call.cancel()

    async def _write_frame(self, call: grpc.aio.StreamStreamCall, frame: pb.RouterFrame) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await call.write(frame)

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        async with asyncio.timeout(FIRST_FRAME_TIMEOUT_S):
            frame = await self._next(call)
        if not frame.HasField("state"):
            raise LinkBrokenError("its first frame carries no state")
        while True:
            self._take(frame)
            async with asyncio.timeout(SILENCE_TIMEOUT_S):
                frame = await self._next(call)

    async def _next(self, call: grpc.aio.StreamStreamCall) -> pb.SchedulerFrame:
        try:
            frame = await call.read()
        except asyncio.CancelledError:
            if call.cancelled() and not _being_cancelled():
                raise LinkBrokenError("writing to it failed") from None
            raise
        if not isinstance(frame, pb.SchedulerFrame):  # grpc.aio.EOF
            raise LinkBrokenError("it ended the stream")
        return frame

    def _lose(self) -> bool:
        """Forgets the scheduler and ends its requests. True if the link had come to life."""
        lived = self._view.state is not None
        entries, self._entries = self._entries, {}
        self._view = _View()
        self._outbox = Outbox()
        self._changed.set()
        if lived:
            log.info("scheduler_lost", scheduler=self.target, requests=len(entries))
        for entry in entries.values():
            _tell_release(entry, Release(refusal=LOST))
        return lived

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:
            self._complaint = reason
            log.warning("scheduler_unreachable", scheduler=self.target, reason=reason)

    # What it says.

    def _take(self, frame: pb.SchedulerFrame) -> None:
        if frame.HasField("state"):
            self._take_state(state_of(frame.state))
        if frame.HasField("loads"):
            self._view.loads = {load.group: load_of(load) for load in frame.loads.groups}
            self._view.unseen = 0
        self._view.warm.difference_update(unpack_short(frame.blocks_removed))
        self._view.warm.update(unpack_short(frame.blocks_stored))
        for tokens in frame.tokens:
            self._take_tokens(tokens)
        for key, index, token_id in PLAIN_TOKEN.iter_unpack(frame.plain_tokens):
            self._take_plain(key, index, token_id)
        for end in frame.ends:
            self._take_end(end)
        for released in frame.released:
            self._release(released.key, release_of(released))

    def _take_state(self, state: State) -> None:
        before, self._view.state = self._view.state, state
        self._view.mismatch = self._expected.mismatch(state)
        self._complaint = ""
        self._changed.set()
        if self._view.mismatch:
            log.error("scheduler_incompatible", scheduler=self.target, reason=self._view.mismatch)
        elif before is None or before.ready != state.ready:
            log.info("scheduler_linked", scheduler=self.target, scheduler_instance=state.scheduler, ready=state.ready)

    def _take_tokens(self, event: pb.TokensEvent) -> None:
        entry = self._entries.get(event.key)
        if entry is None or entry.sink is None or event.index >= entry.n:
            return
        try:
            entry.sink.on_tokens(
                event.index,
                unpack_ids(event.token_ids),
                logprobs_of(event.logprobs) if event.logprobs else (),
                logprobs_of(event.prompt_logprobs) if event.prompt_logprobs else (),
            )
        except Exception as error:
            self._fail(event.key, error)

    def _take_plain(self, key: int, index: int, token_id: int) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.sink is None or index >= entry.n:
            return
        try:
            entry.sink.on_tokens(index, (token_id,), (), ())
        except Exception as error:
            self._fail(key, error)

    def _take_end(self, event: pb.SampleEnd) -> None:
        entry = self._entries.get(event.key)
        if entry is None or entry.sink is None or event.index >= entry.n:
            return
        try:
            entry.sink.on_end(event.index, FinishReason(event.reason), event.stop_token_id)
        except Exception as error:
            self._fail(event.key, error)

    def _fail(self, key: int, error: Exception) -> None:
        """A bug in one request's answer ends that request and no other."""
        error_id = new_error_id()
        log.error("answer_failed", scheduler=self.target, error_id=error_id, exc_info=error)
        entry = self._entries[key]
        refusal = Refusal(name="internal", message=f"internal error {error_id}; the router's log has it")
        sink, entry.sink = entry.sink, None
        self._outbox.abort(key, EVERY_SAMPLE, AbortCause.CLIENT)
        if sink is not None:
            sink.on_release(Release(refusal=refusal))

    def _release(self, key: int, release: Release) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            # It may be over before a load ever told of it.
            self._view.unseen = max(0, self._view.unseen - 1)
            _tell_release(entry, release)


def _tell_release(entry: _Entry, release: Release) -> None:
    if entry.sink is not None:
        entry.sink.on_release(release)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or "it did not answer in time"
