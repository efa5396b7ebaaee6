"""How a router ends: refusing, finishing, cutting off."""

import asyncio
import os
import signal
import socket

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.router.app import serve
from shared.config import RouterConfig
from shared.net.peers import is_local
from shared.net.server import BindError
from shared.rpc.sluice.v1 import control_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1.control_pb2_grpc import ControlStub
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import drained, ends, refusal, rest, run, running_router, until


def ask(**fields):
    return pb.GenerateRequest(prompt="the quick fox", **fields)


async def health(router):
    stub = health_pb2_grpc.HealthStub(router.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status


def test_a_drain_refuses_what_is_new_and_finishes_what_is_in_flight(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            answer = await router.control.Drain(control_pb2.DrainRequest(), timeout=5)
            assert answer.requests_in_flight == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask())
            assert refusal(caught.value) == ("UNAVAILABLE", "", 1)
            info = await router.control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=5)
            assert (info.service, info.draining, list(info.models)) == ("router", True, ["tiny"])
            await until(lambda: True)
            assert await health(router) == health_pb2.HealthCheckResponse.NOT_SERVING
            request.tokens([9])
            request.end()
            request.release()
            assert len(ends([one async for one in call])) == 1
            assert await router.serving == 0

    run(test())


def test_a_drain_that_takes_too_long_cuts_off_and_says_so(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, shutdown_timeout=0.1) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            router.router.stop()
            responses, error = await drained(call)
            assert ends(responses)[0].reason == pb.FINISH_REASON_ABORT
            assert refusal(error) == ("UNAVAILABLE", "", 1)
            assert await router.serving == 0
            await until(lambda: request.aborts != [])

    run(test())


def test_drain_by_rpc_may_name_its_own_time(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(answer=None)) as router:
            call = router.inference.Generate(ask(), timeout=5)
            await call.read()
            await router.control.Drain(control_pb2.DrainRequest(timeout_ms=50), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError):
                await rest(call)
            assert await router.serving == 0

    run(test())


def address_beyond_loopback():
    every = (one for addresses in psutil.net_if_addrs().values() for one in addresses)
    own = [one.address for one in every if one.family == socket.AF_INET]
    return next((address for address in own if not address.startswith("127.")), None)


def test_a_drain_is_not_taken_from_another_machine(tiny_model):
    here = address_beyond_loopback()
    if here is None:
        pytest.skip("this machine has no address but loopback")

    async def test():
        async with running_router(tiny_model, FakeScheduler(), host="0.0.0.0") as router:
            port = router.address.rpartition(":")[2]
            async with grpc.aio.insecure_channel(f"{here}:{port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ControlStub(channel).Drain(control_pb2.DrainRequest(), timeout=5)
                assert refusal(caught.value)[0] == "UNAUTHENTICATED"
                assert "SIGTERM" in caught.value.details()
                await ControlStub(channel).GetLoad(control_pb2.GetLoadRequest(), timeout=5)
            await router.generate(ask(stopping=pb.Stopping(max_tokens=2)))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await ControlStub(channel).Drain(control_pb2.DrainRequest(), timeout=5)
            assert await router.serving == 0

    run(test())


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:50000", True),
        ("ipv4:127.8.9.1:50000", True),
        ("ipv6:%5B::1%5D:50000", True),
        ("ipv6:[::1]:50000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:50000", True),
        ("unix:", True),
        ("unix:/run/sluice.sock", True),
        ("unix-abstract:sluice", True),
        ("ipv4:10.0.0.7:50000", False),
        ("ipv4:0.0.0.0:50000", False),
        ("ipv6:%5Bfd00::2%5D:50000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", False),
        ("ipv6:%5B::ffff:10.0.0.7%5D:50000", False),
        ("ipv4:localhost:50000", False),
        ("vsock:2:50000", False),
        ("", False),
    ],
)
def test_a_caller_is_local_by_loopback_or_unix_socket(peer, local):
    assert is_local(peer) is local


def test_a_router_is_healthy_while_a_scheduler_could_answer(tiny_model):
    async def test():
        scheduler = FakeScheduler(ready=False)
        async with running_router(tiny_model, scheduler, usable=0) as router:
            assert [name for name, _ in router.events] == ["serving"]
            assert await health(router) == health_pb2.HealthCheckResponse.NOT_SERVING
            scheduler.set_state(ready=True)
            await until(lambda: len(router.events) == 2)
            assert router.events[1] == ("ready", {"grpc": router.address, "http": router.http, "models": ["tiny"]})
            assert await health(router) == health_pb2.HealthCheckResponse.SERVING

    run(test())


def test_reflection_lists_the_public_services(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            )
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert {"sluice.v1.Inference", "sluice.v1.Control", "grpc.health.v1.Health"} <= names
            call.cancel()

    run(test())


def test_a_taken_port_is_refused_by_name(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            port = int(router.address.rpartition(":")[2])
            config = RouterConfig(model=str(tiny_model), grpc_port=port, port=0, scheduler=("127.0.0.1:1",))
            with pytest.raises(BindError, match=f"{port}.*--grpc-port"):
                await serve(config)

    run(test())


@pytest.mark.parametrize(("signals", "code"), [(1, 0), (2, 1)])
def test_sigterm_drains_and_a_second_one_is_immediate(tiny_model, signals, code):
    async def test():
        scheduler = FakeScheduler(answer=None)
        await scheduler.start()
        config = RouterConfig(
            model=str(tiny_model),
            grpc_port=0,
            port=0,
            scheduler=(scheduler.address,),
            shutdown_timeout=0.5 if signals == 1 else 60,
        )
        ready: asyncio.Future[dict] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(config, on_event=lambda name, data: ready.set_result(data) if name == "ready" else None)
        )
        async with asyncio.timeout(10):
            address = (await ready)["grpc"]
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_stream("/sluice.v1.Inference/Generate")(ask().SerializeToString(), timeout=10)
            await call.read()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.05)
            assert await serving == code
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await scheduler.stop()

    run(test())
