"""The scheduler as a service: links, workers, leases, epochs, drains. Pretend workers, real gRPC."""

import asyncio
import contextlib
import time

import grpc
import pytest

from services.scheduler.core.events import SampleEnded, Tokens
from services.scheduler.wire import PLAIN_TOKEN, Frame
from shared import PROTOCOL_VERSION
from shared.clock import NS_PER_S
from shared.outcome import FinishReason
from shared.rpc.sluice.v1 import control_pb2, control_pb2_grpc
from shared.rpc.sluice.v1 import execution_pb2 as epb
from shared.rpc.sluice.v1 import execution_pb2_grpc as erpc
from shared.rpc.sluice.v1 import scheduling_pb2 as spb
from shared.rpc.sluice.v1 import scheduling_pb2_grpc as srpc
from shared.sampling import Sampling, TokenLogprobs
from tests.builders.link import linked, running_scheduler, running_worker, submit_message
from tests.builders.pretend_worker import pretend_token


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(pretend_token(tokens, Sampling(seed=1, temperature=0.0)))
    return tokens[len(prompt) :]


def registration(**fields: object) -> epb.RegisterRequest:
    facts = {
        "protocol_version": PROTOCOL_VERSION,
        "worker": "worker-x",
        "address": "127.0.0.1:1",
        "model_fingerprint": "pretend",
        "dtype": "float32",
        "block_size": 16,
        "num_blocks": 8,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "vocab_size": 512,
    }
    return epb.RegisterRequest(**{**facts, **fields})


async def register(scheduler: str, **fields: object) -> epb.RegisterResponse:
    async with grpc.aio.insecure_channel(scheduler) as channel:
        return await erpc.RegistryStub(channel).Register(registration(**fields), timeout=5)


async def status_of(awaitable) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code().name, caught.value.details()


def test_requests_of_a_link_are_answered_and_their_time_adds_up():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler), linked(scheduler) as link:
            for key in range(6):
                link.submit(key, range(20, 60 + key), max_tokens=7)
            for released in await link.released(*range(6)):
                durations = released.durations
                assert durations.total_ns == durations.queue_ns + durations.prefill_ns + durations.decode_ns > 0
            for key in range(6):
                assert link.heard[key].tokens[0] == expected(list(range(20, 60 + key)), 7)
                assert link.heard[key].ends[0].reason == "length"
            assert sum(link.heard[key].released.cached_tokens for key in range(6)) > 0

    asyncio.run(run())


def test_a_link_tells_state_loads_and_warm_blocks_from_its_first_frame():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler, num_blocks=64):
            async with linked(scheduler) as link:
                assert link.state.ready and link.state.block_size == 16 and link.state.vocab_size == 512
                link.submit(1, range(16, 80))
                await link.released(1)
                await link.until(lambda: len(link.warm) == 4)
                await link.until(lambda: link.loads[0].kv_blocks_cached == 4)
            async with linked(scheduler) as other:
                assert len(other.warm) == 4 and other.loads[0].kv_blocks_total == 64

    asyncio.run(run())


def test_a_link_with_nothing_to_say_beats():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler), linked(scheduler) as link:
            await asyncio.sleep(0.1)
            link.changed.clear()
            await asyncio.wait_for(link.changed.wait(), 2.5)

    asyncio.run(run())


def test_a_prompt_in_parts_is_one_prompt():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler), linked(scheduler) as link:
            prompt = list(range(16, 116))
            link.submit(1, prompt[:50], more=True)
            link.submit(1, prompt[50:])
            await link.released(1)
            assert link.heard[1].tokens[0] == expected(prompt, 5)

    asyncio.run(run())


def test_a_link_of_another_protocol_is_refused_by_name():
    async def run() -> None:
        async with running_scheduler() as scheduler:

            async def try_link() -> None:
                async with linked(scheduler, workers=0, version=99):
                    pass

            status, details = await status_of(try_link())
            assert status == "FAILED_PRECONDITION" and "protocol 99" in details

    asyncio.run(run())


def test_a_router_that_goes_leaves_nothing():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler, step_ms=5, max_model_len=1024):
            async with linked(scheduler) as link:
                for key in range(5):
                    link.submit(key, range(16, 40), max_tokens=900)
                await link.until(lambda: len(link.heard) == 5)
            async with linked(scheduler) as other:
                await other.until(lambda: bool(other.loads) and other.loads[0].kv_blocks_referenced == 0)

    asyncio.run(run())


def test_a_router_that_does_not_read_is_let_go_and_its_requests_with_it():
    """Its neighbour is served all the while."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            scheduler = await stack.enter_async_context(running_scheduler(link_stall_timeout_ms=400))
            await stack.enter_async_context(running_worker(scheduler, num_blocks=4096, step_ms=1))
            other = await stack.enter_async_context(linked(scheduler))
            window = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler, options=window))
            call = srpc.SchedulingStub(channel).Link()
            await call.write(spb.RouterFrame(hello=spb.LinkHello(protocol_version=PROTOCOL_VERSION, router="deaf")))
            wordy = {"n": 12, "max_tokens": 1000, "logprobs": 20}
            submits = [submit_message(key, range(16, 40), **wordy) for key in range(4)]
            await call.write(spb.RouterFrame(submits=submits))
            await other.until(lambda: other.loads[0].requests_running == 48)
            other.submit(1, range(16, 40))
            (released,) = await other.released(1)
            assert released.refusal == ""
            await other.until(lambda: other.loads[0].kv_blocks_referenced == 0, timeout_s=5)
            await call.write(spb.RouterFrame(submits=[submit_message(9, range(16, 40), max_tokens=1000)]))
            await asyncio.sleep(0.2)
            assert other.loads[0].requests_running == 0
            async with asyncio.timeout(5):
                while await call.read() is not grpc.aio.EOF:
                    pass

    asyncio.run(run())


def test_an_abort_is_acknowledged_once_whatever_comes_twice():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler, step_ms=5), linked(scheduler) as link:
            link.submit(1, range(16, 40), max_tokens=900)
            await link.until(lambda: 1 in link.heard)
            for _ in range(3):
                link.abort(1)
            link.abort(77)
            (released,) = await link.released(1)
            assert released.refusal == "cancelled" and link.heard[1].ends[0].reason == "abort"

    asyncio.run(run())


def test_a_failed_step_is_tried_again_in_a_newer_epoch():
    async def run() -> None:
        fails = iter([False, True])
        async with (
            running_scheduler() as scheduler,
            running_worker(scheduler, fail_step=lambda plan: next(fails, False)),
            linked(scheduler) as link,
        ):
            link.submit(1, range(16, 40), max_tokens=9)
            (released,) = await link.released(1)
            assert released.refusal == "" and released.durations.preemptions == 1
            assert link.heard[1].tokens[0] == expected(list(range(16, 40)), 9)

    asyncio.run(run())


def test_a_request_that_always_fails_ends_and_the_next_is_served():
    async def run() -> None:
        async with (
            running_scheduler() as scheduler,
            running_worker(scheduler, fail_step=lambda plan: any(a.prompt_len == 13 for a in plan.admits)),
            linked(scheduler) as link,
        ):
            link.submit(1, range(16, 29))
            (released,) = await link.released(1)
            assert released.refusal == "step_failed" and link.heard[1].ends[0].reason == "error"
            link.submit(2, range(16, 40))
            (released,) = await link.released(2)
            assert released.refusal == ""

    asyncio.run(run())


def test_a_lost_workers_requests_go_on_elsewhere():
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            scheduler = await stack.enter_async_context(running_scheduler())
            doomed = contextlib.AsyncExitStack()
            await doomed.enter_async_context(running_worker(scheduler, step_ms=3))
            await stack.enter_async_context(running_worker(scheduler, step_ms=3))
            link = await stack.enter_async_context(linked(scheduler, workers=2))
            prompts = {key: list(range(16 + key, 60 + key)) for key in range(8)}
            for key, prompt in prompts.items():
                link.submit(key, prompt, max_tokens=60)
            await link.until(lambda: sum(len(h.tokens.get(0, ())) for h in link.heard.values()) > 80)
            await doomed.aclose()
            await link.released(*prompts)
            for key, prompt in prompts.items():
                assert link.heard[key].released.refusal == ""
                assert link.heard[key].tokens[0] == expected(prompt, 60)
            assert len(link.loads) == 1

    asyncio.run(run())


def test_without_a_worker_requests_are_refused_and_the_state_says_so():
    async def run() -> None:
        async with running_scheduler() as scheduler, linked(scheduler, workers=0) as link:
            assert not link.state.ready
            link.submit(1, range(16, 40))
            (released,) = await link.released(1)
            assert released.refusal == "no_worker" and released.retry_after_ms > 0
            async with running_worker(scheduler):
                await link.until(lambda: link.state.ready)
            await link.until(lambda: not link.state.ready and not link.loads)

    asyncio.run(run())


@pytest.mark.parametrize(
    "field, value", [("model_fingerprint", "other"), ("dtype", "bfloat16"), ("block_size", 32), ("vocab_size", 5)]
)
def test_a_worker_that_does_not_match_the_others_is_refused_by_name(field: str, value: object):
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler):
            status, details = await status_of(register(scheduler, **{field: value}))
            assert status == "FAILED_PRECONDITION" and field in details

    asyncio.run(run())


def test_a_worker_of_another_protocol_is_refused():
    async def run() -> None:
        async with running_scheduler() as scheduler:
            status, details = await status_of(register(scheduler, protocol_version=99))
            assert status == "FAILED_PRECONDITION" and "protocol 99" in details

    asyncio.run(run())


def test_a_lease_that_is_not_renewed_runs_out():
    async def run() -> None:
        async with running_scheduler(lease_ttl_ms=300) as scheduler, contextlib.AsyncExitStack() as stack:
            server = grpc.aio.server()
            erpc.add_ExecutionServicer_to_server(_SilentWorker(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            response = await register(scheduler, address=f"127.0.0.1:{port}")
            link = await stack.enter_async_context(linked(scheduler))
            await link.until(lambda: link.state.ready)
            await link.until(lambda: not link.state.ready, timeout_s=3)
            async with grpc.aio.insecure_channel(scheduler) as channel:
                renew = erpc.RegistryStub(channel).Renew(epb.RenewRequest(lease=response.lease), timeout=5)
                assert (await status_of(renew))[0] == "NOT_FOUND"

    asyncio.run(run())


async def silent_worker(stack: contextlib.AsyncExitStack, scheduler: str) -> tuple[erpc.RegistryStub, int]:
    """Registers a worker that answers no plan; what its leases are renewed with."""
    server = grpc.aio.server()
    erpc.add_ExecutionServicer_to_server(_SilentWorker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    response = await register(scheduler, address=f"127.0.0.1:{port}")
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(scheduler))
    return erpc.RegistryStub(channel), response.lease


def test_a_worker_that_makes_no_progress_is_given_up():
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            scheduler = await stack.enter_async_context(running_scheduler(heartbeat_timeout_ms=400))
            stub, lease = await silent_worker(stack, scheduler)

            async def renew() -> None:
                while True:
                    await stub.Renew(epb.RenewRequest(lease=lease, progress=3))
                    await asyncio.sleep(0.05)

            renewing = asyncio.create_task(renew())
            link = await stack.enter_async_context(linked(scheduler))
            await link.until(lambda: link.state.ready)
            link.submit(1, range(16, 40))
            (released,) = await link.released(1, timeout_s=5)
            assert released.refusal == "worker_lost" and released.retry_after_ms > 0
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    asyncio.run(run())


def test_a_slow_step_that_makes_progress_keeps_its_worker():
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            scheduler = await stack.enter_async_context(running_scheduler(heartbeat_timeout_ms=400))
            stub, lease = await silent_worker(stack, scheduler)
            link = await stack.enter_async_context(linked(scheduler))
            await link.until(lambda: link.state.ready)
            link.submit(1, range(16, 40))
            for layers in range(30):
                await stub.Renew(epb.RenewRequest(lease=lease, progress=layers))
                await asyncio.sleep(0.05)
            assert link.state.ready
            with pytest.raises(TimeoutError):
                await link.released(1, timeout_s=0.05)

    asyncio.run(run())


class _SilentWorker(erpc.ExecutionServicer):
    """Accepts the stream and answers no plan."""

    async def Execute(self, request_iterator, context):
        await anext(aiter(request_iterator))
        yield epb.ExecuteReply(ready=epb.ExecuteReady(epoch=1))
        await asyncio.sleep(60)


def test_a_scheduler_restarted_with_the_clock_set_back_gets_its_workers_again(monkeypatch):
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with running_scheduler() as scheduler:
                await stack.enter_async_context(running_worker(scheduler))
            an_hour_ago = time.time_ns() - 3600 * NS_PER_S
            monkeypatch.setattr("services.scheduler.app.time.time_ns", lambda: an_hour_ago)
            port = int(scheduler.rpartition(":")[2])
            async with running_scheduler(port=port) as again, linked(again) as link:
                for key in (1, 2):
                    link.submit(key, range(16, 40))
                    (released,) = await link.released(key)
                    assert released.refusal == ""

    asyncio.run(run())


def test_a_deadline_passes_while_nothing_else_happens():
    async def run() -> None:
        async with running_scheduler() as scheduler, running_worker(scheduler, step_ms=400), linked(scheduler) as link:
            link.submit(1, range(16, 40), max_tokens=50, deadline_in_ns=100_000_000)
            (released,) = await link.released(1, timeout_s=0.35)
            assert released.refusal == "deadline_exceeded"

    asyncio.run(run())


def test_a_drain_refuses_the_new_and_finishes_the_old():
    async def run() -> None:
        async with running_scheduler(shutdown_timeout=5) as scheduler, running_worker(scheduler, step_ms=2):  # noqa: SIM117
            async with linked(scheduler) as link:
                link.submit(1, range(16, 40), max_tokens=100)
                await link.until(lambda: 1 in link.heard)
                async with grpc.aio.insecure_channel(scheduler) as channel:
                    stub = control_pb2_grpc.ControlStub(channel)
                    assert (await stub.Drain(control_pb2.DrainRequest(timeout_ms=5000))).requests_in_flight == 1
                    await link.until(lambda: link.state.draining)
                    info = await stub.GetServerInfo(control_pb2.GetServerInfoRequest())
                    assert info.service == "scheduler" and info.draining
                link.submit(2, range(16, 40))
                first, second = await link.released(1, 2)
                assert second.refusal == "draining"
                assert first.refusal == "" and len(link.heard[1].tokens[0]) == 100

    with contextlib.suppress(grpc.aio.AioRpcError):  # the builder's own drain finds the scheduler gone
        asyncio.run(run())


def test_load_adds_up():
    async def run() -> None:
        async with (
            running_scheduler() as scheduler,
            running_worker(scheduler, num_blocks=40),
            linked(scheduler) as link,
        ):
            link.submit(1, range(16, 90))
            await link.released(1)
            async with grpc.aio.insecure_channel(scheduler) as channel:
                load = await control_pb2_grpc.ControlStub(channel).GetLoad(control_pb2.GetLoadRequest())
            (group,) = load.groups
            assert group.kv_blocks_free + group.kv_blocks_cached + group.kv_blocks_referenced == 40
            assert (group.kv_blocks_referenced, group.kv_blocks_cached, load.requests_in_flight) == (0, 4, 0)

    asyncio.run(run())


def test_prompt_logprobs_of_a_long_prompt_come_in_parts():
    async def run() -> None:
        async with (
            running_scheduler() as scheduler,
            running_worker(scheduler, max_model_len=4096, num_blocks=300, max_num_seqs=4),
            linked(scheduler) as link,
        ):
            prompt = [16 + i % 400 for i in range(3000)]
            link.submit(1, prompt, max_tokens=2, prompt_logprobs=2)
            await link.released(1)
            assert link.heard[1].prompt_logprobs == 2999
            assert link.heard[1].tokens[0] == expected(prompt, 2)

    asyncio.run(run())


def test_an_internal_port_beyond_loopback_needs_the_token():
    from shared.net.server import BindError, require_private

    with pytest.raises(BindError, match="SLUICE_INTERNAL_TOKEN"):
        require_private("0.0.0.0", "")
    require_private("0.0.0.0", "secret")
    require_private("127.0.0.1", "")


def test_calls_without_the_token_are_refused():
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            scheduler = await stack.enter_async_context(_guarded_scheduler())
            status, _ = await status_of(register(scheduler))
            assert status == "UNAUTHENTICATED"

    asyncio.run(run())


@contextlib.asynccontextmanager
async def _guarded_scheduler():
    from services.scheduler.app import serve
    from shared.config import SchedulerConfig

    ready: asyncio.Queue[str] = asyncio.Queue()
    config = SchedulerConfig(port=0, metrics_port=0, internal_token="secret")
    task = asyncio.create_task(serve(config, on_event=lambda name, fields: ready.put_nowait(fields["address"])))
    yield await ready.get()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_frames_over_a_megabyte_are_split_in_order():
    """Those with logprobs first, then the plain ones, then the ends."""
    frame, top = Frame(), TokenLogprobs(-1.0, 1, tuple(range(200)), (0.5,) * 200)
    for key in range(40):
        frame.plain += [PLAIN_TOKEN.pack(key, 0, token) for token in range(key, key + 5_000)]
        frame.tell_event(Tokens((1, 100 + key), 0, tuple(range(20)), logprobs=(top,) * 20))
    frame.tell_event(SampleEnded((1, 39), 0, FinishReason.LENGTH))
    parts = list(frame.messages())
    assert len(parts) > 4 and all(part.ByteSize() < 2 * 2**20 for part in parts)
    assert [event.key for part in parts for event in part.tokens] == list(range(100, 140))
    plain = [record for part in parts for record in PLAIN_TOKEN.iter_unpack(part.plain_tokens)]
    assert plain == [(key, 0, token) for key in range(40) for token in range(key, key + 5_000)]
    kinds = [kind for part in parts for kind in ("tokens", "plain_tokens", "ends") if getattr(part, kind)]
    assert kinds == sorted(kinds, key=("tokens", "plain_tokens", "ends").index)
    assert [len(part.ends) for part in parts] == [0] * (len(parts) - 1) + [1]


@pytest.mark.parametrize("count", [0, 1, 65_535, 65_536, 65_537])
def test_no_plain_token_is_lost_where_a_frame_is_split(count):
    frame = Frame()
    frame.plain += [PLAIN_TOKEN.pack(7, 3, token) for token in range(count)]
    plain = [record for part in frame.messages() for record in PLAIN_TOKEN.iter_unpack(part.plain_tokens)]
    assert plain == [(7, 3, token) for token in range(count)]
