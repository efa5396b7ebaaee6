"""Requests that end early: cancelled, abandoned, stalled, late, aborted by name."""

import asyncio
import gc
import random
from contextlib import aclosing

import grpc
import pytest
import structlog

from services.router import session
from services.router.answer import Answer
from services.router.rejections import Rejections
from services.router.request import GenerateOptions, TokenPrompt
from services.router.session import Session
from shared.clock import monotonic_ns
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from shared.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from shared.sampling import Sampling, Stopping, Want
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import drained, ends, ids, refusal, rest, run, running_router, until
from tests.counts import count

EVERY = -1


def ask(**fields):
    return pb.GenerateRequest(prompt="the quick fox", **fields)


def endless(request, index):
    return [request.token_ids[0] or 5] * 100_000


def test_a_cancelled_call_reaches_the_scheduler_at_once(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            await call.read()
            request = await scheduler.request()
            request.tokens([9])
            await call.read()
            call.cancel()
            async with asyncio.timeout(0.5):
                await request.aborted.wait()
            assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_CLIENT)]
            await router.idle()

    run(test())


def test_cancels_at_random_points_leave_nothing_behind(tiny_model):
    async def test():
        rng = random.Random(3)
        scheduler = FakeScheduler(answer=endless, step_s=0.002)
        async with running_router(tiny_model, scheduler) as router:

            async def one():
                call = router.inference.Generate(ask(), timeout=10)
                await asyncio.sleep(rng.random() * 0.1)
                call.cancel()

            for _ in range(count("router_cancels") // 10):
                await asyncio.gather(*(one() for _ in range(10)))
            await router.idle()
            assert all(request.aborts for request in scheduler.requests)
            await asyncio.sleep(0.1)
            gc.collect()
            assert not [
                one for one in gc.get_objects() if type(one) is Answer
            ]  # isinstance would wake torch's lazy objects

    run(test(), timeout_s=120)


def test_a_client_that_vanishes_is_an_abort(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=endless, step_s=0.001)
        async with running_router(tiny_model, scheduler) as router:
            channel = grpc.aio.insecure_channel(router.address, options=[("grpc.use_local_subchannel_pool", 1)])
            stream = channel.unary_stream("/sluice.v1.Inference/Generate")
            call = stream(ask().SerializeToString())
            await call.read()
            request = await scheduler.request()
            await channel.close()
            async with asyncio.timeout(1):
                await request.aborted.wait()
            await router.idle()

    run(test())


def test_a_deadline_travels_and_ends_the_request(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=0.3)
            request = await scheduler.request()
            assert 0.1e9 < request.submit.deadline_in_ns <= 0.31e9
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [one async for one in call]
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            async with asyncio.timeout(0.5):
                await request.aborted.wait()
            (index, cause) = request.aborts[0]
            assert index == EVERY
            assert cause in (scheduling_pb2.ABORT_CAUSE_DEADLINE, scheduling_pb2.ABORT_CAUSE_CLIENT)
            await router.idle()

    run(test())


def test_a_deadline_that_the_scheduler_cannot_keep_is_refused_by_name(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            request.release("deadline_unreachable", message="needs 9 s")
            assert (await call.read()).HasField("accepted")
            assert (await call.read()).finished.reason == pb.FINISH_REASON_ERROR
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert refusal(caught.value) == ("DEADLINE_EXCEEDED", "", 0)
            assert caught.value.details() == "needs 9 s"

    run(test())


def test_abort_by_request_id_ends_every_sample_and_is_idempotent(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(request_id="mine", sampling=pb.Sampling(n=2)), timeout=5)
            request = await scheduler.request()
            request.tokens([9], index=1)
            request.end(index=1)
            await call.read()
            await until(lambda: len(router.router.admission) == 1)
            await asyncio.sleep(0.05)
            assert (await router.inference.Abort(pb.AbortRequest(request_id="mine"), timeout=5)).found
            responses, error = await drained(call)
            finished = ends(responses)
            assert [(one.index, one.reason) for one in finished] == [
                (1, pb.FINISH_REASON_LENGTH),
                (0, pb.FINISH_REASON_ABORT),
            ]
            assert finished[-1].usage.completion_tokens == 1
            assert error.code() is grpc.StatusCode.CANCELLED
            assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_CLIENT)]
            await router.idle()
            assert not (await router.inference.Abort(pb.AbortRequest(request_id="mine"), timeout=5)).found

    run(test())


def test_a_client_that_does_not_read_is_ended_and_delays_nobody(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        settings = {"stall_timeout_ms": 300, "max_unread_bytes": 64 * 2**20}
        async with running_router(tiny_model, scheduler, **settings) as router:
            window = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
            channel = grpc.aio.insecure_channel(router.address, options=window)
            stalled = InferenceStub(channel).Generate(ask(), timeout=20)
            request = await scheduler.request()
            for _ in range(8):  # more than the flow-control window
                request.tokens([300] * 20_000)
                await asyncio.sleep(0.01)
            other = router.inference.Generate(ask(), timeout=5)
            neighbour = await scheduler.request(1)
            for token in (9, 10, 11):
                neighbour.tokens([token])
            neighbour.end()
            neighbour.release()
            begin = asyncio.get_running_loop().time()
            assert ids([one async for one in other]) == [9, 10, 11]
            assert asyncio.get_running_loop().time() - begin < 1
            async with asyncio.timeout(3):
                await request.aborted.wait()
            assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_STALLED)]
            await router.idle()
            _, error = await drained(stalled)
            assert refusal(error) == ("RESOURCE_EXHAUSTED", "", 0)
            await channel.close()

    run(test(), timeout_s=40)


@pytest.mark.parametrize("leave", ["cancel", "close"])
def test_a_client_that_leaves_while_a_write_to_it_is_blocked_is_no_failure(tiny_model, leave):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_unread_bytes=64 * 2**20) as router:
            window = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
            channel = grpc.aio.insecure_channel(router.address, options=window)
            call = InferenceStub(channel).Generate(ask(), timeout=20)
            request = await scheduler.request()
            for _ in range(4):
                request.tokens([300] * 40_000)
                await asyncio.sleep(0.01)
            with structlog.testing.capture_logs() as lines:
                if leave == "cancel":
                    call.cancel()
                else:
                    await channel.close()
                async with asyncio.timeout(2):
                    await request.aborted.wait()
                await router.idle()
                await asyncio.sleep(0.05)
            assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_CLIENT)]
            assert [line for line in lines if line["log_level"] == "error"] == []
            await channel.close()

    run(test(), timeout_s=40)


def test_unread_deltas_merge_and_are_bounded(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_unread_bytes=100_000) as router:
            call = router.inference.Generate(ask(), timeout=20)
            request = await scheduler.request()
            for _ in range(60):
                request.tokens([300] * 20_000)
            async with asyncio.timeout(5):
                await request.aborted.wait()
            responses, error = await drained(call)
            assert refusal(error)[0] == "RESOURCE_EXHAUSTED"
            assert ends(responses)[0].reason == pb.FINISH_REASON_ABORT

    run(test(), timeout_s=40)


def test_deltas_of_a_slow_client_arrive_merged_and_complete(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=lambda request, index: [300 + i % 90 for i in range(400)])
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=20)
            await call.read()
            await asyncio.sleep(0.3)
            responses = await rest(call)
            assert ids(responses) == [300 + i % 90 for i in range(400)]

    run(test())


def test_a_request_aborted_before_it_was_submitted_never_reaches_the_scheduler(tiny_model, monkeypatch):
    import threading

    gate, entered = threading.Event(), threading.Event()
    prepare = session.prepare

    def slow(*args):
        entered.set()
        gate.wait(5)
        return prepare(*args)

    monkeypatch.setattr(session, "prepare", slow)

    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(request_id="early"), timeout=5)
            await until(entered.is_set)
            assert (await router.inference.Abort(pb.AbortRequest(request_id="early"), timeout=5)).found
            gate.set()
            _, error = await drained(call)
            assert error.code() is grpc.StatusCode.CANCELLED
            assert scheduler.requests == []

    run(test())


class Events(list):
    """The wide events of requests, as a log."""

    def info(self, event, **facts):
        self.append(facts)


@pytest.fixture
def events(monkeypatch):
    log = Events()
    monkeypatch.setattr(session, "log", log)
    return log


def test_an_aborted_request_has_an_account(tiny_model, events):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            wanted = pb.ResponseOptions(include_timing=True)
            call = router.inference.Generate(ask(request_id="mine", response=wanted), timeout=5)
            request = await scheduler.request()
            request.tokens([9])
            await call.read()
            await router.inference.Abort(pb.AbortRequest(request_id="mine"), timeout=5)
            responses, error = await drained(call)
            assert error.code() is grpc.StatusCode.CANCELLED
            (finished,) = ends(responses)
            timing = finished.timing
            assert (timing.queue_ns, timing.prefill_ns, timing.decode_ns) == (10, 20, 30)
            assert timing.link_ns == timing.schedule_ns - 60
            assert finished.usage.cached_tokens == 3
            assert events[0]["end"] == "cancelled"

    run(test())


def test_an_aborted_request_that_the_scheduler_does_not_release_ends_all_the_same(tiny_model, monkeypatch):
    monkeypatch.setattr(session, "ABORT_ACK_TIMEOUT_S", 0.1)

    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(request_id="mine"), timeout=5)
            (await scheduler.request()).released = True  # so it says
            await router.inference.Abort(pb.AbortRequest(request_id="mine"), timeout=5)
            async with asyncio.timeout(1):
                responses, error = await drained(call)
            assert error.code() is grpc.StatusCode.CANCELLED
            assert [one.reason for one in ends(responses)] == [pb.FINISH_REASON_ABORT]

    run(test())


def test_a_request_that_hit_its_deadline_says_so_in_the_log_with_its_phases(tiny_model, events):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            with pytest.raises(grpc.aio.AioRpcError):
                await rest(router.inference.Generate(ask(), timeout=0.3))
            await until(lambda: events)
            assert events[0]["end"] == "deadline_exceeded"
            assert {"queue_ms", "prefill_ms", "decode_ms"} <= events[0].keys()

    run(test())


def test_nobody_waits_for_the_account_of_a_client_that_is_gone(tiny_model, events, monkeypatch):
    monkeypatch.setattr(session, "ABORT_ACK_TIMEOUT_S", 30)

    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=1) as router:
            call = router.inference.Generate(ask(request_id="again"), timeout=5)
            request = await scheduler.request()
            request.released = True  # so it says
            call.cancel()
            async with asyncio.timeout(0.5):
                await request.aborted.wait()
            await until(lambda: not len(router.router.admission))
            assert not events
            request.release()
            await until(lambda: events)
            assert events[0]["end"] == "left"
            assert "decode_ms" in events[0]

    run(test())


def test_a_first_token_has_its_time_though_the_answer_was_over_before_it_was_read(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            inference = Session(
                model=router.router._model,
                fleet=router.router.fleet,
                admission=router.router.admission,
                tokenizing=router.router._tokenizing,
                checking=router.router._checking,
                max_unread_bytes=1 << 20,
                traces=router.router.traces,
                metrics=router.router.metrics,
                rejections=Rejections(router.router.metrics, monotonic_ns),
                instance="test",
                now=monotonic_ns,
            )
            options = GenerateOptions(
                request_id="slow",
                model="tiny",
                sampling=Sampling(seed=1),
                stopping=Stopping(max_tokens=4),
                want=Want(),
                include_timing=True,
            )
            async with aclosing(inference.run(TokenPrompt((1, 2, 3)), options)) as events:
                await anext(events)
                await scheduler.request()
                await asyncio.sleep(0.2)
                *_, last = [event async for event in events]
            assert 0.2e9 < last.timing.time_to_first_token_ns <= last.timing.total_ns

    run(test())
