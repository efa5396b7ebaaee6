"""What the router counts, read as Prometheus reads it, in front of a fake scheduler."""

import asyncio

import grpc
import pytest

from shared.rpc.sluice.v1 import control_pb2, scheduling_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.telemetry.metrics import EXPORTED
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import RunningRouter, run, running_router, until
from tests.builders.scrape import Scrape, fetch, scrape


def ask(max_tokens=8, **fields):
    return pb.GenerateRequest(prompt="the quick fox", stopping=pb.Stopping(max_tokens=max_tokens), **fields)


async def read(router: RunningRouter) -> Scrape:
    return await asyncio.to_thread(scrape, router.http)


async def refused(router: RunningRouter, **fields) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await router.generate(ask(**fields))


def rejections(said: Scrape) -> dict[str, float]:
    return {reason: n for reason, n in said.labels("admission_rejections_total", "reason").items() if n}


def ends(said: Scrape) -> dict[str, float]:
    return {reason: n for reason, n in said.labels("request_success_total", "finished_reason").items() if n}


def test_the_router_exports_its_metrics_and_no_other(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            said = await read(router)
        assert said.kinds == {metric.name: metric.kind for metric in EXPORTED["router"]}
        for metric in EXPORTED["router"]:
            if metric.kind == "histogram":
                assert list(said.buckets(metric.name)) == [*metric.buckets, float("inf")]
                assert said(metric.name + "_count") == 0
        assert said.labels("request_success_total", "finished_reason") == {
            "stop": 0,
            "length": 0,
            "abort": 0,
            "error": 0,
        }
        assert set(said.labels("admission_rejections_total", "reason").values()) == {0}

    run(test())


def test_an_answer_counts_tokens_latencies_and_its_end(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = asyncio.create_task(router.generate(ask()))
            request = await scheduler.request()
            for token in (5, 6, 7):
                request.tokens([token])
                await asyncio.sleep(0.03)
            request.end()
            request.release(
                cached_tokens=2,
                durations=scheduling_pb2.PhaseDurations(
                    total_ns=6_000_000, queue_ns=1_000_000, prefill_ns=2_000_000, decode_ns=3_000_000
                ),
            )
            await call
            prompt = len(request.token_ids)
            said = await read(router)
        assert (said("prompt_tokens_total"), said("generation_tokens_total")) == (prompt, 3)
        assert said("prompt_tokens_cached_total") == 2
        assert (said("request_prompt_tokens_sum"), said("request_generation_tokens_sum")) == (prompt, 3)
        assert (said("request_queue_time_seconds_sum"), said("request_prefill_time_seconds_sum")) == (0.001, 0.002)
        assert said("request_decode_time_seconds_sum") == 0.003
        assert said("time_to_first_token_seconds_count") == said("e2e_request_latency_seconds_count") == 1
        assert said("inter_token_latency_seconds_count") == 2
        between = said("inter_token_latency_seconds_sum")
        assert 0.05 < between < said("e2e_request_latency_seconds_sum")
        assert said("request_time_per_output_token_seconds_sum") == pytest.approx(between / 2)
        assert ends(said) == {"length": 1}
        assert rejections(said) == {}

    run(test())


def test_each_sample_has_its_own_pace_and_end(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(step_s=0.01)) as router:
            await router.generate(ask(max_tokens=3, sampling=pb.Sampling(n=2)))
            said = await read(router)
        assert said("generation_tokens_total") == 6
        assert said("request_generation_tokens_sum") == 6
        assert said("request_generation_tokens_count") == 1
        assert said("inter_token_latency_seconds_count") <= 4
        assert ends(said) == {"length": 2}

    run(test())


def test_a_refusal_is_counted_by_its_name_wherever_it_was_made(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=1) as router:
            await refused(router, model="unknown")
            await refused(router, sampling=pb.Sampling(temperature=9))
            held = router.inference.Generate(ask(request_id="held"))
            await held.read()
            await refused(router)
            await refused(router, request_id="held")
            (await scheduler.request()).release(
                refusal="deadline_unreachable", durations=scheduling_pb2.PhaseDurations()
            )
            await until(lambda: not len(router.router.admission))
            said = await read(router)
        assert rejections(said) == {
            "model_not_found": 1,
            "invalid_argument": 1,
            "queue_full": 1,
            "request_id_in_use": 1,
            "deadline_unreachable": 1,
        }
        assert said("e2e_request_latency_seconds_count") == 0
        assert ends(said) == {}

    run(test())


def test_a_client_that_leaves_is_an_abort_and_what_came_for_it_is_counted(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(step_s=0.02)) as router:
            call = router.inference.Generate(ask(max_tokens=400, request_id="gone"))
            await call.read()
            await call.read()
            call.cancel()
            await router.idle()
            await until(lambda: router.router.traces.latest(1))
            said = await read(router)
            request = control_pb2.ListTracesRequest(request_id="gone")
            [trace] = (await router.control.ListTraces(request)).traces
        assert ends(said) == {"abort": 1}
        assert said("generation_tokens_total") == int(trace.spans[0].attributes["gen_ai.usage.output_tokens"]) > 0
        assert said("e2e_request_latency_seconds_count") == 1
        assert rejections(said) == {}

    run(test())


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_after_admission_is_no_rejection(tiny_model, begun):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask())
            request = await scheduler.request()
            if begun:
                request.tokens([5])
            request.release(refusal="worker_lost")
            with pytest.raises(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            await router.idle()
            said = await read(router)
        assert ends(said) == {"error": 1}
        assert rejections(said) == {}
        assert said("time_to_first_token_seconds_count") == begun

    run(test())


def test_the_first_token_is_counted_when_it_comes_and_not_when_the_answer_ends(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask())
            await call.read()
            request = await scheduler.request()
            request.tokens([5])
            await call.read()
            said = await read(router)
            assert (said("time_to_first_token_seconds_count"), said("generation_tokens_total")) == (1, 1)
            assert said("e2e_request_latency_seconds_count") == 0
            request.end()
            request.release()

    run(test())


def test_spans_that_no_collector_takes_are_counted(tiny_model, monkeypatch):
    async def test():
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        monkeypatch.setattr("shared.telemetry.otlp.RETRIES", 0)
        settings = {"otlp_traces_endpoint": "http://127.0.0.1:1"}
        async with running_router(tiny_model, FakeScheduler(), **settings) as router:
            await router.generate(ask())
            async with asyncio.timeout(20):
                while not (await read(router))("spans_dropped_total"):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    run(test())


def test_the_router_is_healthy_while_it_would_answer(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            await until(lambda: router.router._able)
            assert await asyncio.to_thread(fetch, router.http, "/health") == (200, "ok\n")
            scheduler.set_state(draining=True)
            await until(lambda: not router.router._able)
            assert (await asyncio.to_thread(fetch, router.http, "/health"))[0] == 503

    run(test())
