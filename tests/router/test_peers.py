"""What the processes of one router ask each other: Abort, CountRequests, ListTraces, Drain and ReadMetrics."""

import asyncio
import random

import msgspec

from services.router.admission import Admission
from services.router.gate import Key
from services.router.metrics import RouterMetrics
from services.router.peers import OwnAnswers, PeerPlace, Peers
from services.router.traces import Traces
from shared.clock import monotonic_ns
from shared.outcome import AbortCause
from shared.telemetry.context import Sampler, begin
from shared.telemetry.lag import LoopLag
from shared.telemetry.spans import Span, Trace
from tests.builders.router import run


def trace(request_id: str) -> Trace:
    span = Span(name="generate", service="router", instance="i", parent=-1, start_ns=0, end_ns=5)
    context = begin(None, Sampler(), random.Random(1))
    return Trace(
        request_id=request_id,
        trace_id=context.trace_id,
        root_id=context.span_id,
        parent_id=b"",
        sampled=False,
        arrived_ns=7,
        spans=[span],
    )


class Process:
    """One of two: its own books, and its view of the other."""

    def __init__(self, folder, index):
        self.admission = Admission(8, monotonic_ns)
        self.traces = Traces(Sampler(), None)
        self.metrics = RouterMetrics()
        self.drained = []
        self.peers = Peers(PeerPlace(str(folder), index, 2))

    async def open(self):
        async def drain(timeout_s):
            self.drained.append(timeout_s)

        exposition = self.metrics.exposition(lag=LoopLag().histogram, num_dropped_spans=lambda: 0)
        await self.peers.open(
            OwnAnswers(admission=self.admission, traces=self.traces, exposition=exposition, drain=drain)
        )


def test_each_tells_the_other_what_it_knows(tmp_path):
    async def test():
        one, other = Process(tmp_path, 0), Process(tmp_path, 1)
        await one.open()
        await other.open()
        try:
            assert await one.peers.requests_in_flight() == 0
            other.traces.add(trace("theirs"))
            other.metrics.reject("queue_full")
            with other.admission.admit("a", Key(tenant="t")) as place:
                assert await one.peers.requests_in_flight() == 1
                assert not await one.peers.abort("a", ""), "another tenant's"
                assert await one.peers.abort("a", "t")
                assert place.cause is AbortCause.CLIENT
            assert [found.request_id for found in await one.peers.traces(5, "")] == ["theirs"]
            assert await one.peers.traces(5, "mine") == []
            [snapshot] = await one.peers.snapshots()
            assert [["queue_full"], 1] in msgspec.json.decode(snapshot)["admission_rejections_total"]
            assert await one.peers.drain(1500) == 0
            assert (one.drained, other.drained) == ([], [1.5])
        finally:
            await one.peers.close()
            await other.peers.close()

    run(test())


def test_one_that_is_gone_has_nothing_to_tell(tmp_path):
    async def test():
        one = Process(tmp_path, 0)
        await one.open()
        try:
            async with asyncio.timeout(10):
                assert await one.peers.requests_in_flight() == 0
                assert await one.peers.snapshots() == []
                assert not await one.peers.abort("a", "")
        finally:
            await one.peers.close()

    run(test())
