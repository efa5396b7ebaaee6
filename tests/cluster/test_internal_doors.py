"""The doors that services open for each other, knocked at from outside: a scheduler's links and its registry."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest

from services.cli.client import CallError, Client
from shared import PROTOCOL_VERSION
from shared.net.channel import internal_metadata
from shared.rpc.sluice.v1 import execution_pb2, execution_pb2_grpc, scheduling_pb2, scheduling_pb2_grpc

pytestmark = pytest.mark.cluster

WORKER = {
    "protocol_version": PROTOCOL_VERSION,
    "worker": "worker-1",
    "address": "127.0.0.1:1",
    "model_fingerprint": "twin",
    "dtype": "float32",
    "device": "cpu",
    "block_size": 16,
    "num_blocks": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "max_model_len": 512,
    "vocab_size": 128,
    "world": 1,
}


@pytest.fixture
def scheduler(service) -> str:
    """The address of a scheduler without workers."""
    return service("scheduler", port=0, lease_ttl_ms=1000).wait_event("ready")["address"]


@pytest.fixture
def silent() -> Iterator[str]:
    """Where a worker can be reached that never says a word: the scheduler waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def call(address: str, talk: Callable[[grpc.aio.Channel], Awaitable[object]]) -> grpc.StatusCode | object:
    """What `talk` returns over a channel to `address`, or the status that ends it."""

    async def scenario() -> object:
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                return await asyncio.wait_for(talk(channel), 10)
            except grpc.aio.AioRpcError as error:
                return error.code()

    return asyncio.run(scenario())


def register(**changes: object) -> Callable[[grpc.aio.Channel], Awaitable[object]]:
    request = execution_pb2.RegisterRequest(**WORKER | changes)
    return lambda channel: execution_pb2_grpc.RegistryStub(channel).Register(request)


def test_a_worker_gets_a_lease_and_renews_it(scheduler: str, silent: str) -> None:
    async def talk(channel: grpc.aio.Channel) -> object:
        registry = execution_pb2_grpc.RegistryStub(channel)
        given = await registry.Register(execution_pb2.RegisterRequest(**WORKER | {"address": silent}))
        assert given.ttl_ms == 1000
        return await registry.Renew(execution_pb2.RenewRequest(lease=given.lease, progress=0))

    assert call(scheduler, talk) == execution_pb2.RenewResponse()


def test_an_unknown_lease_is_not_found(scheduler: str) -> None:
    renew = execution_pb2.RenewRequest(lease=4711)
    assert call(scheduler, lambda c: execution_pb2_grpc.RegistryStub(c).Renew(renew)) == grpc.StatusCode.NOT_FOUND


def test_a_worker_of_another_protocol_is_refused(scheduler: str) -> None:
    assert call(scheduler, register(protocol_version=PROTOCOL_VERSION + 1)) == grpc.StatusCode.FAILED_PRECONDITION


def test_a_worker_that_does_not_match_the_first_is_refused(scheduler: str, silent: str) -> None:
    async def talk(channel: grpc.aio.Channel) -> object:
        await register(address=silent)(channel)
        return await register(worker="worker-2", address="127.0.0.1:2", dtype="bfloat16")(channel)

    assert call(scheduler, talk) == grpc.StatusCode.FAILED_PRECONDITION


def hello(version: int) -> AsyncIterator[scheduling_pb2.RouterFrame]:
    async def frames() -> AsyncIterator[scheduling_pb2.RouterFrame]:
        yield scheduling_pb2.RouterFrame(hello=scheduling_pb2.LinkHello(protocol_version=version, router="router-1"))
        await asyncio.sleep(30)

    return frames()


def test_a_link_begins_with_the_state(scheduler: str) -> None:
    async def talk(channel: grpc.aio.Channel) -> object:
        link = scheduling_pb2_grpc.SchedulingStub(channel).Link(hello(PROTOCOL_VERSION))
        try:
            return await link.read()
        finally:
            link.cancel()

    frame = call(scheduler, talk)
    assert isinstance(frame, scheduling_pb2.SchedulerFrame)
    assert frame.state.protocol_version == PROTOCOL_VERSION
    assert not frame.state.ready


def test_a_router_of_another_protocol_is_refused(scheduler: str) -> None:
    async def talk(channel: grpc.aio.Channel) -> object:
        link = scheduling_pb2_grpc.SchedulingStub(channel).Link(hello(PROTOCOL_VERSION + 1))
        await link.read()
        return await link.code()

    assert call(scheduler, talk) == grpc.StatusCode.FAILED_PRECONDITION


def test_a_scheduler_answers_control_too(scheduler: str) -> None:
    async def scenario() -> tuple[str, int]:
        async with Client(scheduler) as client:
            return (await client.server_info()).service, len((await client.load()).groups)

    assert asyncio.run(scenario()) == ("scheduler", 0)


def test_an_internal_port_asks_for_the_token(service) -> None:
    running = service("scheduler", port=0, environ={"SLUICE_INTERNAL_TOKEN": "hush"})
    address = running.wait_event("ready")["address"]
    assert call(address, register()) == grpc.StatusCode.UNAUTHENTICATED

    def with_token(channel: grpc.aio.Channel) -> Awaitable[object]:
        request = execution_pb2.RegisterRequest(**WORKER)
        return execution_pb2_grpc.RegistryStub(channel).Register(request, metadata=internal_metadata("hush"))

    assert isinstance(call(address, with_token), execution_pb2.RegisterResponse)


def test_an_internal_port_stays_on_loopback_without_a_token(service) -> None:
    running = service("scheduler", port=0, host="0.0.0.0")
    assert running.process.wait(20) == 2
    assert "SLUICE_INTERNAL_TOKEN" in running.tail()
    assert "Traceback" not in running.tail()


@pytest.mark.parametrize("name", ["scheduler", "worker", "router"])
def test_a_service_whose_port_is_taken_says_so_and_ends(service, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port, flag = holder.getsockname()[1], "grpc_port" if name == "router" else "port"
        running = service(name, **{flag: port})
        assert running.process.wait(60) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in running.tail()
    assert "Traceback" not in running.tail()
    assert [event.name for event in running.events if event.name != "loading"] == ["refused"]


def test_a_drain_ends_a_scheduler_with_0(service) -> None:
    running = service("scheduler", port=0)
    address = running.wait_event("ready")["address"]

    async def scenario() -> int:
        async with Client(address) as client:
            return await client.drain()

    try:
        assert asyncio.run(scenario()) == 0
    except CallError as error:  # it may be gone before it has answered
        assert error.status == "UNAVAILABLE"
    assert running.process.wait(10) == 0
