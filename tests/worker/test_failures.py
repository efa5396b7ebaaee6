"""Errors of a GPU, injected: what a step may break by itself, and what takes the process with it."""

import asyncio

import pytest
import torch

from services.cli.supervise import End, Restart, RestartPolicy, judge
from services.worker import app
from services.worker.execute.failures import explain
from services.worker.models.decoder import load_decoder
from services.worker.plan import DeviceLostError, PlanError, StepError
from shared.checkpoint import open_checkpoint
from shared.config import WorkerConfig
from shared.net.channel import open_internal_channel
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1.execution_pb2_grpc import ExecutionStub
from tests.builders.plans import make_admit, make_plan, plan_message
from tests.builders.pretend_worker import PretendRunner, pretend_loaded
from tests.builders.registry import FakeRegistry, serve_registry
from tests.builders.runners import LateCopies, answer_alone, make_asked, make_runner
from tests.models.twins import make_twin
from tests.worker.test_device_thread import LateRunner, driven

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ILLEGAL_ACCESS = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OUT_OF_MEMORY, StepError),
        (RuntimeError("CUDA error: out of memory"), StepError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), StepError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), StepError),
        (ILLEGAL_ACCESS, DeviceLostError),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceLostError),
        (RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered"), DeviceLostError),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), DeviceLostError),
    ],
)
def test_errors_of_cuda_are_sorted_by_whether_the_context_survives(error, kind):
    explained = explain(error)
    assert type(explained) is kind
    assert "\n" not in str(explained)


@pytest.mark.parametrize(
    "error",
    [StepError("1 of 2 rows have NaN"), PlanError("unknown_slot", "x"), ValueError("CUDA"), RuntimeError("size")],
)
def test_what_is_not_cudas_stays_as_it_is(error):
    assert explain(error) is error


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = make_twin("llama", tmp_path_factory.mktemp("twins"))
    return load_decoder(open_checkpoint(str(path)), torch.float32)


class Failing:
    layers_done = 0

    def __init__(self, error):
        self.error = error

    def forward(self, batch, pool):
        raise self.error


def test_a_step_without_memory_fails_with_a_clear_error_and_the_next_epoch_goes_on(decoder):
    runner = make_runner(decoder)
    runner._decoder = Failing(OUT_OF_MEMORY)
    plan = make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])])
    with pytest.raises(StepError, match=r"out of GPU memory: .*Tried to allocate 2.00 GiB"):
        runner.begin(plan)
    runner._decoder = decoder
    runner.reset()
    assert len(answer_alone(runner, make_asked([4, 5], 3)).tokens) == 3


def test_an_error_that_shows_when_a_step_is_read_is_sorted_too(decoder):
    class Lost(LateCopies):
        def fetch(self, tensors):
            arrival = super().fetch(tensors)

            def read():
                raise ILLEGAL_ACCESS

            arrival.read = read
            return arrival

    runner = make_runner(decoder, copies=Lost())
    begun = runner.begin(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])]))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        runner.finish(begun)


class LostRunner(LateRunner):
    def finish(self, pending):
        pending.wait()
        raise DeviceLostError("illegal memory access")


def test_a_lost_device_answers_nothing_more_and_says_so():
    async def scenario(it):
        it.submit(1, 2)
        await it.begun(2)
        it.runner.steps[1].computed.set()
        with pytest.raises(DeviceLostError, match="illegal memory access"):
            await asyncio.wait_for(asyncio.shield(it.thread.lost), 5)
        it.submit(3)
        it.runner.steps[2].computed.set()
        await asyncio.sleep(0.02)
        assert it.results.empty()
        assert 3 not in it.runner.steps

    driven(LostRunner(), scenario)


def test_a_worker_that_ended_so_is_started_again():
    end = End(name="worker 1", exit_code=app.EXIT_DEVICE_LOST, was_ready=True, ever_ready=True)
    assert isinstance(judge(end, RestartPolicy()), Restart)


def test_a_worker_whose_device_is_lost_breaks_its_stream_and_ends_with_a_code_of_its_own(monkeypatch, capsys):
    class Runner(PretendRunner):
        def run(self, plan):
            raise DeviceLostError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(app, "_load", lambda config, progress: pretend_loaded(Runner()))
    monkeypatch.setattr(app, "configure_logs", lambda *arguments: None)

    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            ready = asyncio.get_running_loop().create_future()
            config = WorkerConfig(host="127.0.0.1", port=0, metrics_port=0, scheduler=registry.address)

            def on_event(name, facts):
                if name == "ready" and not ready.done():
                    ready.set_result(facts["address"])

            serving = asyncio.create_task(app.serve(config, on_event=on_event))
            async with open_internal_channel(await asyncio.wait_for(ready, 5)) as channel:
                call = ExecutionStub(channel).Execute()
                await call.write(pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=1)))
                assert (await call.read()).ready.epoch == 1
                await call.write(plan_message(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [5, 6])])))
                with pytest.raises(Exception, match="this worker is stopping"):
                    await call.read()
                return await asyncio.wait_for(serving, 10)

    assert asyncio.run(scenario()) == app.EXIT_DEVICE_LOST
    assert "a new process must take it up" in capsys.readouterr().err
