"""What the router notes of a request becomes its trace, through the real doors, in front of a fake scheduler."""

import asyncio

import grpc
import pytest

from shared.rpc.sluice.v1 import control_pb2, scheduling_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.collector import Collector
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import run, running_router, until

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ask(**fields):
    fields.setdefault("stopping", pb.Stopping(max_tokens=8))
    return pb.GenerateRequest(prompt="the quick fox", **fields)


async def traces(router, **request):
    return (await router.control.ListTraces(control_pb2.ListTracesRequest(**request))).traces


def children(trace, parent):
    return [span for span in trace.spans if span.parent == parent]


def assert_adds_up(trace):
    """The children of the whole, and of `schedule`, are disjoint and fill their parent."""
    for parent, span in enumerate(trace.spans):
        inner = children(trace, parent)
        if not inner:
            continue
        at = span.start_ns
        for child in inner:
            assert child.start_ns == at
            at += child.duration_ns
        assert at == span.start_ns + span.duration_ns


def segments(*parts):
    return [scheduling_pb2.PhaseSegment(phase=phase, ns=ns, **more) for phase, ns, more in parts]


def test_an_answer_leaves_a_trace_that_adds_up(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = asyncio.create_task(router.generate(ask(request_id="one")))
            await until(lambda: scheduler.requests)
            request = scheduler.requests[0]
            request.tokens([5, 6])
            await asyncio.sleep(0.01)
            request.end()
            account = segments(
                ("queue", 2_000_000, {"reason_ns": {"blocks": 1_500_000, "budget": 500_000}}),
                (
                    "prefill",
                    3_000_000,
                    {
                        "steps": 1,
                        "rows": 4,
                        "device_ns": 2_500_000,
                        "chunks": 1,
                        "computed_tokens": 7,
                        "cached_tokens": 2,
                        "sampled_tokens": 1,
                    },
                ),
                (
                    "decode",
                    4_000_000,
                    {
                        "steps": 2,
                        "rows": 6,
                        "device_ns": 3_000_000,
                        "chunks": 2,
                        "computed_tokens": 2,
                        "sampled_tokens": 2,
                        "preemptions": 1,
                    },
                ),
                ("queue", 1_000_000, {"reason_ns": {"blocks": 1_000_000}}),
                ("prefill", 2_000_000, {"steps": 1, "rows": 1, "chunks": 1, "computed_tokens": 12}),
            )
            durations = scheduling_pb2.PhaseDurations(
                total_ns=12_000_000, queue_ns=3_000_000, prefill_ns=5_000_000, decode_ns=4_000_000, segments=account
            )
            request.release(durations=durations, cached_tokens=1)
            await call
            [trace] = await traces(router)
        assert trace.request_id == "one"
        assert [span.name for span in children(trace, 0)] == ["admit", "tokenize", "route", "schedule", "deliver"]
        assert [span.name for span in children(trace, 4)] == ["link", "queue", "prefill", "decode", "queue", "prefill"]
        assert_adds_up(trace)
        whole, queue, prefill, decode, again = trace.spans[0], *trace.spans[7:10], trace.spans[11]
        assert whole.attributes["gen_ai.response.id"] == "one"
        assert whole.attributes["gen_ai.usage.output_tokens"] == "2"
        assert whole.attributes["gen_ai.usage.cache_read.input_tokens"] == "1"
        assert (queue.service, queue.attributes["sluice.queue.reason"]) == ("sluice-scheduler", "blocks")
        assert queue.attributes["sluice.queue.blocks_ms"] == "1.5"
        assert (decode.attributes["sluice.steps"], decode.attributes["sluice.batch_size_mean"]) == ("2", "3")
        assert (decode.attributes["sluice.decode.tokens"], decode.attributes["sluice.preemptions"]) == ("2", "1")
        for span, computed, cached in ((prefill, "7", "2"), (again, "12", "0")):
            assert span.attributes["sluice.prefill.computed_tokens"] == computed
            assert span.attributes["sluice.prefill.cached_tokens"] == cached
            assert span.attributes["sluice.prefill.chunks"] == "1"
        assert trace.spans[3].attributes["sluice.route.candidates"] == scheduler.address

    run(test())


def test_a_trace_is_joined_to_its_callers_and_exported(tiny_model, monkeypatch):
    async def test():
        with Collector() as collector:
            monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
            settings = {"otlp_traces_endpoint": f"http://{collector.address}"}
            async with running_router(tiny_model, FakeScheduler(), **settings) as router:
                metadata = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"), ("tracestate", "vendor=1"))
                await router.generate(ask(), metadata=metadata)
                await router.generate(ask(), metadata=(("traceparent", f"00-{'1' * 32}-{SPAN_ID}-00"),))
                await router.idle()
            found = collector.traces()
        [spans] = found.values()
        whole = next(span for service, span in spans if span.name == "generate")
        assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
        assert whole.trace_state == "vendor=1"

    run(test())


def test_a_refusal_leaves_a_trace_that_says_where_it_ended(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(max_model_len=4)) as router:
            with pytest.raises(grpc.aio.AioRpcError):
                await router.generate(ask(request_id="long"))
            [trace] = await traces(router, request_id="long")
        assert_adds_up(trace)
        assert trace.spans[0].error == trace.spans[-1].error == "prompt_too_long"
        assert trace.spans[0].attributes["error.type"] == "prompt_too_long"

    run(test())


def test_a_client_that_leaves_leaves_a_trace(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(step_s=0.05)) as router:
            call = router.inference.Generate(ask(request_id="gone", stopping=pb.Stopping(max_tokens=400)))
            await call.read()
            await call.read()
            call.cancel()
            await router.idle()
            await until(lambda: router.router.traces.latest(1))
            [trace] = await traces(router)
        assert_adds_up(trace)
        assert trace.spans[0].attributes["sluice.request.end"] == "left"

    run(test())


def test_the_last_traces_are_listed_newest_first(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            for name in ("a", "b", "c"):
                await router.generate(ask(request_id=name))
            assert [trace.request_id for trace in await traces(router, limit=2)] == ["c", "b"]
            by_trace = (await traces(router, request_id="b"))[0].trace_id
            assert [trace.request_id for trace in await traces(router, request_id=by_trace)] == ["b"]
            assert not await traces(router, request_id="unknown")

    run(test())
