import asyncio
import contextlib
import threading

import grpc
import numpy as np
import pytest

from services.worker.execute.device_thread import DeviceThread
from services.worker.servicer import ExecutionServicer
from shared.net.channel import open_internal_channel
from shared.net.options import INTERNAL_MESSAGE_BYTES
from shared.net.server import bind, create_server
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1.execution_pb2_grpc import ExecutionStub
from shared.sampling import Sampling
from tests.builders.plans import make_admit, make_plan, plan_message
from tests.builders.pretend_worker import PretendRunner, pretend_token

GREEDY = Sampling(seed=0, temperature=0.0)
TIMEOUT_S = 5.0


class GatedRunner(PretendRunner):
    """Waits for `gate` in every step, so that a test decides when one ends."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def run(self, plan):
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return super().run(plan)


class Worker:
    def __init__(self, stub, runner, device, servicer):
        self.stub, self.runner, self.device, self.servicer = stub, runner, device, servicer

    async def begin(self, epoch):
        call = self.stub.Execute()
        await call.write(pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=epoch, scheduler="test")))
        return call

    async def ready(self, epoch):
        call = await self.begin(epoch)
        reply = await read(call)
        assert reply.ready.epoch == epoch
        return call


async def read(call):
    reply = await asyncio.wait_for(call.read(), TIMEOUT_S)
    if reply is grpc.aio.EOF:
        raise AssertionError(f"the stream ended: {await call.code()}, {await call.details()}")
    return reply


async def end_of(call):
    """Reads to the end; the status."""
    try:
        while await asyncio.wait_for(call.read(), TIMEOUT_S) is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), await call.details()


@contextlib.asynccontextmanager
async def worker(runner=None, *, attach=True, compiler=None):
    server = create_server(max_receive_bytes=INTERNAL_MESSAGE_BYTES)
    servicer = ExecutionServicer()
    servicer.add_to(server)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    runner = runner or GatedRunner()
    device = DeviceThread(runner)
    device.start()
    if attach:
        servicer.attach(device, compiler)
    channel = open_internal_channel(f"127.0.0.1:{port}")
    try:
        yield Worker(ExecutionStub(channel), runner, device, servicer)
    finally:
        runner.gate.set()
        await channel.close()
        await server.stop(0)
        assert await device.stop(TIMEOUT_S)


def scenario(test):
    """Runs an async test on its own loop."""

    def run():
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def prompt_plan(step, slot=0, token_ids=(5, 6, 7), blocks=(3,)):
    return make_plan(step, [(slot, len(token_ids), True, blocks)], [make_admit(slot, token_ids)])


def tokens_of(reply):
    assert reply.result.error == ""
    return np.frombuffer(reply.result.tokens, "<u4").tolist()


@scenario
async def test_plans_sent_ahead_of_their_results_feed_each_other():
    async with worker() as w:
        call = await w.ready(1)
        await call.write(plan_message(prompt_plan(1)))
        await call.write(plan_message(make_plan(2, [(0, 1, True, ())])))
        first, second = await read(call), await read(call)
        assert (first.result.step, second.result.step) == (1, 2)
        history = [5, 6, 7]
        for reply in (first, second):
            expected = pretend_token(history, GREEDY)
            assert tokens_of(reply) == [expected]
            history.append(expected)
        assert first.result.run_ns > 0
        assert w.device.steps_done == 2


@scenario
async def test_an_epoch_that_is_not_newer_is_refused():
    async with worker() as w:
        live = await w.ready(5)
        for epoch in (4, 5):
            code, details = await end_of(await w.begin(epoch))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"epoch {epoch} is not newer than 5" in details
        await live.write(plan_message(prompt_plan(1)))
        assert tokens_of(await read(live)) == [pretend_token([5, 6, 7], GREEDY)]


@scenario
async def test_a_newer_epoch_ends_the_older_stream_and_drops_all_slots():
    async with worker() as w:
        old = await w.ready(1)
        await old.write(plan_message(prompt_plan(1)))
        await read(old)
        new = await w.ready(2)
        code, details = await end_of(old)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "epoch 1 gave way to epoch 2" in details
        await new.write(plan_message(make_plan(2, [(0, 1, True, ())])))
        assert (await read(new)).result.error.startswith("unknown_slot")


@scenario
async def test_a_newer_epoch_drops_plans_that_have_not_started():
    async with worker() as w:
        old = await w.ready(1)
        w.runner.gate.clear()
        await old.write(plan_message(prompt_plan(1)))
        await old.write(plan_message(make_plan(2, [(0, 1, True, ())])))
        await asyncio.to_thread(w.runner.entered.wait, TIMEOUT_S)
        new = await w.begin(2)
        await end_of(old)
        w.runner.gate.set()
        assert (await read(new)).ready.epoch == 2
        assert w.runner.steps == 1


@scenario
async def test_a_long_step_shows_progress_by_its_layers():
    async with worker(GatedRunner()) as w:
        call = await w.ready(1)
        w.runner.gate.clear()
        await call.write(plan_message(prompt_plan(1)))
        assert await asyncio.to_thread(w.runner.entered.wait, TIMEOUT_S)
        before = w.device.progress
        w.runner.layers_done += 3
        assert (w.device.progress, w.device.steps_done) == (before + 3, 0)
        w.runner.gate.set()
        await read(call)


@scenario
async def test_after_a_failed_step_every_plan_is_skipped_until_a_newer_epoch():
    runner = GatedRunner(fail_step=lambda plan: plan.step == 2)
    async with worker(runner) as w:
        call = await w.ready(1)
        for plan in (prompt_plan(1), make_plan(2, [(0, 1, True, ())]), make_plan(3, [(0, 1, True, ())])):
            await call.write(plan_message(plan))
        errors = [(await read(call)).result.error for _ in range(3)]
        assert errors == ["", "pretend failure", "skipped: step 2 failed"]
        assert w.device.steps_done == 3
        call = await w.ready(2)
        await call.write(plan_message(prompt_plan(4)))
        assert tokens_of(await read(call)) == [pretend_token([5, 6, 7], GREEDY)]


def test_a_log_that_cannot_be_written_does_not_end_the_device_thread(monkeypatch):
    class FullDisk:
        def error(self, *args, **facts):
            raise OSError("no space left on device")

    async def run():
        async with worker(GatedRunner(fail_step=lambda plan: plan.step == 1)) as w:
            results = asyncio.Queue()
            await w.device.begin(1)
            for step in (1, 2):
                w.device.submit(make_plan(step), epoch=1, arrived_ns=0, deliver=results.put_nowait)
            errors = [(await asyncio.wait_for(results.get(), TIMEOUT_S)).error for _ in range(2)]
            assert errors == ["pretend failure", "skipped: step 1 failed"]

    monkeypatch.setattr("services.worker.execute.device_thread.log", FullDisk())
    asyncio.run(run())


@scenario
async def test_a_cancelled_stream_leaves_the_device_thread_to_the_next():
    async with worker() as w:
        ended = asyncio.Event()
        w.servicer.on_stream_end = ended.set
        call = await w.ready(1)
        w.runner.gate.clear()
        await call.write(plan_message(prompt_plan(1)))
        await asyncio.to_thread(w.runner.entered.wait, TIMEOUT_S)
        call.cancel()
        await asyncio.wait_for(ended.wait(), TIMEOUT_S)
        w.runner.gate.set()
        call = await w.ready(2)
        await call.write(plan_message(prompt_plan(2)))
        assert tokens_of(await read(call)) == [pretend_token([5, 6, 7], GREEDY)]


@scenario
async def test_a_half_closed_stream_ends_behind_its_last_result():
    async with worker() as w:
        call = await w.ready(1)
        w.runner.gate.clear()
        await call.write(plan_message(prompt_plan(1)))
        await call.done_writing()
        await asyncio.to_thread(w.runner.entered.wait, TIMEOUT_S)
        w.runner.gate.set()
        assert tokens_of(await read(call)) == [pretend_token([5, 6, 7], GREEDY)]
        assert (await end_of(call))[0] is grpc.StatusCode.OK


@scenario
async def test_the_event_loop_answers_while_a_step_runs():
    async with worker() as w:
        call = await w.ready(1)
        w.runner.gate.clear()
        await call.write(plan_message(prompt_plan(1)))
        await asyncio.to_thread(w.runner.entered.wait, TIMEOUT_S)
        assert (await end_of(await w.begin(1)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert w.device.steps_done == 0
        w.runner.gate.set()
        await read(call)


@scenario
async def test_streams_are_refused_before_the_model_is_loaded():
    async with worker(attach=False) as w:
        assert (await end_of(await w.begin(1)))[0] is grpc.StatusCode.UNAVAILABLE


@scenario
async def test_a_flood_of_plans_ends_the_stream():
    async with worker() as w:
        call = await w.ready(1)
        w.runner.gate.clear()
        with contextlib.suppress(grpc.aio.AioRpcError):
            for step in range(1, 10):
                await call.write(plan_message(make_plan(step)))
        code, details = await end_of(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, details
        w.runner.gate.set()


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=9)), "only plans"),
        (pb.ExecuteRequest(plan=pb.StepPlan(step=1, slots=b"\0")), "slots"),
        (pb.ExecuteRequest(plan=pb.StepPlan(step=1, slots=b"\0\0")), "differ in length"),
        (pb.ExecuteRequest(plan=pb.StepPlan(step=1, blocks=b"\0\0\0\0")), "do not add up"),
        (pb.ExecuteRequest(plan=pb.StepPlan(step=1, admits=[pb.Admit(token_ids=b"abc")])), "token_ids"),
    ],
)
def test_messages_that_make_no_sense_end_the_stream(request_, word):
    async def run():
        async with worker() as w:
            call = await w.ready(1)
            await call.write(request_)
            code, details = await end_of(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert word in details

    asyncio.run(run())


@scenario
async def test_a_stream_must_begin_with_begin():
    async with worker() as w:
        call = w.stub.Execute()
        await call.write(plan_message(prompt_plan(1)))
        assert (await end_of(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


@scenario
async def test_closing_ends_the_stream_as_unavailable_behind_its_results():
    async with worker() as w:
        call = await w.ready(1)
        await call.write(plan_message(prompt_plan(1)))
        await read(call)
        w.servicer.close()
        assert (await end_of(call))[0] is grpc.StatusCode.UNAVAILABLE


@scenario
async def test_logprobs_and_prompt_logprobs_travel_with_their_rows():
    async with worker() as w:
        call = await w.ready(1)
        admits = [make_admit(0, [5, 6, 7]), make_admit(1, [8, 9, 10], logprobs=2, prompt_logprobs=1)]
        rows = [(0, 3, True, (1,)), (1, 3, True, (2,))]
        await call.write(plan_message(make_plan(1, rows, admits)))
        result = (await read(call)).result
        (entry,) = result.logprobs
        assert (entry.row, entry.logprobs.logprob, entry.logprobs.rank) == (1, -1.0, 1)
        sampled = np.frombuffer(result.tokens, "<u4")[1]
        assert np.frombuffer(entry.logprobs.top_ids, "<u4").tolist() == [sampled, sampled + 1]
        assert np.frombuffer(entry.logprobs.top_logprobs, "<f4").tolist() == [-1.0, -2.0]
        (prompt,) = result.prompt_logprobs
        assert (prompt.row, prompt.start) == (1, 1)
        assert [np.frombuffer(each.top_ids, "<u4").tolist() for each in prompt.logprobs] == [[9], [10]]
