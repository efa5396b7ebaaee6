import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.worker.host import host
from services.worker.registration import RegistrationRefusedError
from services.worker.servicer import SERVICE_NAME
from shared.config import WorkerConfig
from shared.net.channel import open_internal_channel
from shared.net.server import BindError
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1.execution_pb2_grpc import ExecutionStub
from shared.telemetry.metrics import EXPORTED
from tests.builders.plans import make_admit, make_plan, plan_message
from tests.builders.pretend_worker import PretendRunner, pretend_loaded
from tests.builders.registry import FakeRegistry, serve_registry
from tests.builders.scrape import scrape


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def config_for(registry, **fields):
    return WorkerConfig(host="127.0.0.1", port=0, metrics_port=0, scheduler=registry.address, **fields)


class Hosted:
    """A host in this process, told to stop by the signal that it listens to."""

    def __init__(self, config, load):
        self.events = []
        self.ready = asyncio.Event()
        self.task = asyncio.create_task(host(config, load, instance="worker-test", on_event=self._on_event))

    def _on_event(self, name, facts):
        self.events.append((name, facts))
        if name == "ready":
            self.ready.set()

    async def stop(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return await self.task


async def health_of(address):
    async with open_internal_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=2)
        return reply.status


def test_a_worker_serves_when_loaded_and_registered_and_ends_with_0_on_sigterm():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            loaded = pretend_loaded(PretendRunner())

            def load(progress):
                progress(50, 100)
                return loaded

            hosted = Hosted(config_for(registry), load)
            await asyncio.wait_for(hosted.ready.wait(), 5)
            names = [name for name, _ in hosted.events]
            assert names == ["loading", "registering", "ready"]
            assert hosted.events[0][1] == {"done_bytes": 50, "total_bytes": 100}
            facts = hosted.events[-1][1]
            assert (facts["num_blocks"], facts["dtype"], facts["device"]) == (256, "float32", "pretend")
            assert registry.registered[0].address == facts["address"]
            assert await health_of(facts["address"]) == health_pb2.HealthCheckResponse.SERVING
            assert await hosted.stop() == 0

    run(scenario())


def test_the_step_in_flight_is_finished_and_answered_before_the_end():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            runner = PretendRunner(step_ms=300)
            hosted = Hosted(config_for(registry), lambda progress: pretend_loaded(runner))
            await asyncio.wait_for(hosted.ready.wait(), 5)
            async with open_internal_channel(hosted.events[-1][1]["address"]) as channel:
                call = ExecutionStub(channel).Execute()
                await call.write(pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=1)))
                assert (await call.read()).ready.epoch == 1
                await call.write(plan_message(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [5, 6])])))
                await asyncio.sleep(0.1)
                stopping = asyncio.create_task(hosted.stop())
                assert (await call.read()).result.step == 1
                with pytest.raises(grpc.aio.AioRpcError, match="this worker is stopping"):
                    await call.read()
                assert await call.code() is grpc.StatusCode.UNAVAILABLE
                assert await stopping == 0

    run(scenario())


def test_a_worker_is_not_serving_while_it_loads_and_can_be_stopped_then():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            release, ended = threading.Event(), threading.Event()

            def load(progress):
                release.wait(10)
                try:
                    progress(1, 1)
                finally:
                    ended.set()

            port = free_port()
            config = WorkerConfig(host="127.0.0.1", port=port, metrics_port=0, scheduler=registry.address)
            hosted = Hosted(config, load)
            await asyncio.sleep(0.2)
            assert await health_of(f"127.0.0.1:{port}") == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await hosted.stop() == 0
            assert registry.registered == []
            release.set()
            assert await asyncio.to_thread(ended.wait, 5)

    run(scenario())


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_failed_load_is_raised_to_the_caller():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:

            def load(progress):
                raise ValueError("no such model")

            with pytest.raises(ValueError, match="no such model"):
                await Hosted(config_for(registry), load).task

    run(scenario())


def test_a_refused_registration_is_raised_to_the_caller():
    async def scenario():
        async with serve_registry(FakeRegistry(refusal="dtype float32, the others bfloat16")) as registry:
            hosted = Hosted(config_for(registry), lambda progress: pretend_loaded(PretendRunner()))
            with pytest.raises(RegistrationRefusedError, match="the others bfloat16"):
                await hosted.task

    run(scenario())


def test_a_taken_port_and_an_unprotected_host_are_refused_by_name():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            port = int(registry.address.split(":")[1])
            taken = WorkerConfig(host="127.0.0.1", port=port, metrics_port=0, scheduler=registry.address)
            with pytest.raises(BindError, match="the port is taken"):
                await Hosted(taken, None).task
            no_metrics = WorkerConfig(host="127.0.0.1", port=0, metrics_port=port, scheduler=registry.address)
            with pytest.raises(BindError, match=f"{port}.*--metrics-port"):
                await Hosted(no_metrics, None).task
            open_host = WorkerConfig(host="0.0.0.0", port=0, metrics_port=0, scheduler=registry.address)
            with pytest.raises(BindError, match="SLUICE_INTERNAL_TOKEN"):
                await Hosted(open_host, None).task

    run(scenario())


def test_the_pretend_worker_is_a_process_that_needs_no_torch():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            blocker = "import sys; sys.modules['torch'] = None; from tests.builders.pretend_worker import main; "
            command = [sys.executable, "-c", blocker + "sys.exit(main(sys.argv[1:]))"]
            process = subprocess.Popen(  # noqa: ASYNC220 - starting takes a millisecond, and the test waits for it
                [*command, "--scheduler", registry.address, "--num-blocks", "9"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            with process:
                await registry.until(registered=1)
                assert registry.registered[0].num_blocks == 9
                assert await asyncio.to_thread(process.stdout.readline) == f"ready {registry.registered[0].address}\n"
                started = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 10) == 0
                assert time.monotonic() - started < 3

    run(scenario())


def test_a_worker_says_what_its_cache_is_and_what_its_steps_cost():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            runner = PretendRunner()
            loaded = msgspec.structs.replace(pretend_loaded(runner), table_verdicts={"other_triton": 1, "refused": 0})
            hosted = Hosted(config_for(registry), lambda progress: loaded)
            await asyncio.wait_for(hosted.ready.wait(), 5)
            facts = hosted.events[-1][1]
            before = await asyncio.to_thread(scrape, facts["metrics"])
            async with open_internal_channel(facts["address"]) as channel:
                call = ExecutionStub(channel).Execute()
                await call.write(pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=1)))
                await call.read()
                await call.write(plan_message(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [5, 6])])))
                assert (await call.read()).result.error == ""
                runner.num_late_compilations = 2
                after = await asyncio.to_thread(scrape, facts["metrics"])
            assert after.kinds == {metric.name: metric.kind for metric in EXPORTED["worker"]}
            assert after.labels("cache_config_info", "num_gpu_blocks") == {"256": 1}
            assert after.labels("cache_config_info", "cache_dtype") == {"float32": 1}
            assert after.labels("product_tables_total", "verdict") == {"other_triton": 1, "refused": 0}
            assert before("estimated_flops_total") == before("estimated_read_bytes_total") == 0
            assert after("estimated_flops_total") == 2 * 1000 + 100 + 3
            assert after("estimated_read_bytes_total") == 4000 + 400 + 2 * 40 + 2 * 4
            assert (before("late_compilations_total"), after("late_compilations_total")) == (0, 2)
            assert await hosted.stop() == 0

    run(scenario())


def test_metrics_are_served_while_the_model_loads():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            release = threading.Event()
            port = free_port()
            config = WorkerConfig(host="127.0.0.1", port=0, metrics_port=port, scheduler=registry.address)
            hosted = Hosted(config, lambda progress: release.wait(10) and pretend_loaded(PretendRunner()))
            async with asyncio.timeout(5):
                while not listens(port):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            said = await asyncio.to_thread(scrape, f"127.0.0.1:{port}")
            assert said.labels("cache_config_info", "block_size") == {}
            release.set()
            await asyncio.wait_for(hosted.ready.wait(), 5)
            assert await hosted.stop() == 0

    run(scenario())


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
