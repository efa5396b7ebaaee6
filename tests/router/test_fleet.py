"""Schedulers that come, go, restart, lie, and share the work."""

import asyncio

import grpc
import pytest
import structlog

from services.router.fleet.addresses import check_addresses, resolve
from shared import PROTOCOL_VERSION
from shared.config import ConfigError
from shared.prefix import SHORT_HASH_BYTES, chain, root_hash, short
from shared.rpc.sluice.v1 import control_pb2, scheduling_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import drained, ends, refusal, run, running_router, until


def ask(**fields):
    if not fields.keys() & {"token_ids"}:
        fields.setdefault("prompt", "the quick fox")
    return pb.GenerateRequest(**fields)


def test_a_lost_scheduler_ends_its_requests_within_a_second_and_is_found_again(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(sampling=pb.Sampling(n=2)), timeout=5)
            request = await scheduler.request()
            request.tokens([9])
            for _ in range(2):
                await call.read()
            loop = asyncio.get_running_loop()
            begin = loop.time()
            await scheduler.stop()
            responses, error = await drained(call)
            assert loop.time() - begin < 1
            assert refusal(error) == ("UNAVAILABLE", "", 0.5)
            assert [one.reason for one in ends(responses)] == [pb.FINISH_REASON_ERROR] * 2
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask())
            assert refusal(caught.value) == ("UNAVAILABLE", "", 1)
            scheduler.answer = lambda request, index: [9, 10]
            begin = loop.time()
            await scheduler.start()
            await router.usable()
            assert loop.time() - begin < 2
            await router.generate(ask())

    run(test())


def test_a_link_whose_writer_fails_is_made_afresh_and_its_requests_end(tiny_model, monkeypatch):
    from services.router.fleet import outbox

    take, failures = outbox.Outbox.take, [RuntimeError("a bug")]

    def broken(self):
        if failures:
            raise failures.pop()
        return take(self)

    async def test():
        async with running_router(tiny_model, FakeScheduler(answer=lambda request, index: [9, 10])) as router:
            monkeypatch.setattr(outbox.Outbox, "take", broken)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask())
            assert refusal(caught.value)[0] == "UNAVAILABLE"
            await router.usable()
            await router.generate(ask())

    with structlog.testing.capture_logs() as logs:
        run(test())
    assert [line["event"] for line in logs].count("link_writer_failed") == 1


def test_an_aborted_submit_that_was_never_written_leaves_no_bytes_behind():
    from services.router.fleet.outbox import EVERY_SAMPLE, MAX_OUTBOX_BYTES, Outbox
    from services.router.fleet.values import Submission
    from shared.outcome import AbortCause
    from shared.sampling import Sampling, Stopping, Want

    async def test():
        box = Outbox()
        long = Submission(
            request_id="a",
            token_ids=[1] * (MAX_OUTBOX_BYTES // 4),
            sampling=Sampling(seed=0),
            stopping=Stopping(),
            want=Want(),
        )
        for key in range(5):
            box.submit(key, long)
            assert not box.abort(key, EVERY_SAMPLE, AbortCause.CLIENT)
        assert list(box.take()) == []

    asyncio.run(test())


def test_a_scheduler_that_falls_silent_is_lost_though_its_connection_lives(tiny_model, monkeypatch):
    monkeypatch.setattr("services.router.fleet.link.SILENCE_TIMEOUT_S", 0.4)

    async def test():
        scheduler = FakeScheduler(answer=None)
        scheduler.beat_s = 0.1
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            await scheduler.request()
            await asyncio.sleep(1)
            assert not call.done()
            scheduler.beat_s = 60.0
            _, error = await drained(call)
            assert refusal(error) == ("UNAVAILABLE", "", 0.5)

    run(test())


def test_a_complete_answer_that_only_lacks_its_account_survives_a_lost_scheduler(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            request.tokens([9])
            request.end("stop")
            await call.read()
            await call.read()
            await scheduler.stop()
            finished = await call.read()
            assert finished.finished.reason == pb.FINISH_REASON_STOP
            assert await call.read() is grpc.aio.EOF

    run(test())


def test_a_scheduler_without_a_worker_or_draining_gets_nothing(tiny_model):
    async def test():
        scheduler = FakeScheduler(ready=False)
        async with running_router(tiny_model, scheduler, usable=0) as router:
            await until(lambda: scheduler.hellos != [])
            with pytest.raises(grpc.aio.AioRpcError):
                await router.generate(ask())
            scheduler.set_state(ready=True)
            await router.usable(1)
            await router.generate(ask())
            scheduler.set_state(draining=True)
            await router.usable(0)

    run(test())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"protocol_version": 99}, "protocol version 99"),
        ({"vocab_size": 401}, "401 tokens"),
        ({"block_size": 0}, "block size"),
        ({"max_model_len": 0}, "maximum length"),
    ],
)
def test_an_incompatible_scheduler_is_named_and_not_used(tiny_model, state, reason):
    async def test():
        scheduler = FakeScheduler(**state)
        async with running_router(tiny_model, scheduler, usable=0) as router:
            await until(lambda: any(link.state for link in router.router.fleet.links))
            assert router.router.fleet.num_usable == 0

    with structlog.testing.capture_logs() as logs:
        run(test())
    (complaint,) = [entry for entry in logs if entry["event"] == "scheduler_incompatible"]
    assert reason in complaint["reason"]


def test_another_model_s_scheduler_is_not_used():
    from services.router.fleet.values import Expected, State

    expected = Expected(model_fingerprint="aa", vocab_size=4)

    def state(fingerprint):
        return State(
            protocol_version=PROTOCOL_VERSION,
            scheduler="s",
            ready=True,
            draining=False,
            model_fingerprint=fingerprint,
            dtype="float32",
            block_size=1,
            max_model_len=1,
            vocab_size=4,
        )

    assert "its model is bb" in expected.mismatch(state("bb"))
    assert expected.mismatch(state("aa")) == expected.mismatch(state("")) == ""
    anything = Expected(model_fingerprint="", vocab_size=4)
    assert anything.mismatch(state("bb")) == ""


def warm(token_ids, blocks):
    hashes = chain(token_ids, 16, root_hash(b"", exact=False))[:blocks]
    return b"".join(short(one) for one in hashes)


def test_a_prompt_goes_where_its_prefix_is_warm(tiny_model):
    async def test():
        token_ids = list(range(2, 130))
        first, second = FakeScheduler(), FakeScheduler()
        second.warm = warm(token_ids, 6)
        async with running_router(tiny_model, first, second) as router:
            await router.generate(ask(token_ids=pb.TokenIds(ids=token_ids)))
            assert (len(first.requests), len(second.requests)) == (0, 1)
            second.send(scheduling_pb2.SchedulerFrame(blocks_removed=warm(token_ids, 6)))
            first.send(scheduling_pb2.SchedulerFrame(blocks_stored=warm(token_ids, 2)))
            await asyncio.sleep(0.05)
            await router.generate(ask(token_ids=pb.TokenIds(ids=token_ids)))
            assert (len(first.requests), len(second.requests)) == (1, 1)
            last_window = warm(token_ids, 6)[-2 * SHORT_HASH_BYTES :]
            second.send(scheduling_pb2.SchedulerFrame(blocks_stored=last_window))
            await asyncio.sleep(0.05)
            await router.generate(ask(token_ids=pb.TokenIds(ids=token_ids)))
            assert (len(first.requests), len(second.requests)) == (1, 2)

    run(test())


def test_short_requests_stay_where_they_are_warm_before_a_load_is_told(tiny_model):
    async def test():
        first, second = FakeScheduler(), FakeScheduler()
        async with running_router(tiny_model, first, second, usable=2) as router:
            prompt = pb.TokenIds(ids=[7] * 64)
            await router.generate(pb.GenerateRequest(token_ids=prompt, stopping=pb.Stopping(max_tokens=2)))
            home = first if first.requests else second
            stored = b"".join(map(short, chain([7] * 64, home.state.block_size, root_hash(b"", exact=False))))
            home.send(scheduling_pb2.SchedulerFrame(blocks_stored=stored))
            await asyncio.sleep(0.05)
            for _ in range(4):
                await router.generate(pb.GenerateRequest(token_ids=prompt, stopping=pb.Stopping(max_tokens=2)))
            assert len(home.requests) == 5

    run(test())


def test_requests_spread_over_equal_schedulers_before_their_loads_are_told(tiny_model):
    async def test():
        schedulers = FakeScheduler(answer=None), FakeScheduler(answer=None)
        async with running_router(tiny_model, *schedulers) as router:
            calls = [router.inference.Generate(ask(), timeout=5) for _ in range(8)]
            for call in calls:
                await call.read()
            await until(lambda: [len(one.requests) for one in schedulers] == [4, 4])
            for call in calls:
                call.cancel()
            await router.idle()

    run(test())


def test_a_busy_scheduler_is_passed_over(tiny_model):
    async def test():
        busy, idle = FakeScheduler(), FakeScheduler()
        async with running_router(tiny_model, busy, idle) as router:
            load = scheduling_pb2.LinkLoad(group="0", requests_waiting=9, kv_blocks_total=10, kv_blocks_free=10)
            busy.send(scheduling_pb2.SchedulerFrame(loads=scheduling_pb2.LinkLoads(groups=[load])))
            await asyncio.sleep(0.05)
            for _ in range(3):
                await router.generate(ask())
            assert (len(busy.requests), len(idle.requests)) == (0, 3)
            answer = await router.control.GetLoad(control_pb2.GetLoadRequest(), timeout=5)
            (group,) = answer.groups
            assert (group.scheduler, group.requests_waiting, group.kv_blocks_free) == (busy.address, 9, 10)

    run(test())


def test_the_other_scheduler_answers_when_one_dies(tiny_model):
    async def test():
        one, other = FakeScheduler(), FakeScheduler()
        async with running_router(tiny_model, one, other) as router:
            await one.stop()
            await router.usable(1)
            for _ in range(3):
                await router.generate(ask())
            assert len(other.requests) == 3

    run(test())


def test_a_link_whose_first_frame_lacks_a_state_is_not_used(tiny_model):
    async def test():
        class Silent(FakeScheduler):
            async def Link(self, request_iterator, context):
                yield scheduling_pb2.SchedulerFrame()
                await asyncio.sleep(10)

        async with running_router(tiny_model, Silent(), usable=0) as router:
            await asyncio.sleep(0.1)
            assert router.router.fleet.num_usable == 0

    run(test())


def test_events_of_unknown_requests_and_samples_are_ignored(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            request.tokens([9], index=7)
            request.end(index=7)
            scheduler.send(scheduling_pb2.SchedulerFrame(released=[scheduling_pb2.Released(key=999)]))
            request.tokens([9])
            request.end("stop")
            request.release()
            assert len(ends([one async for one in call])) == 1

    run(test())


def test_links_carry_the_cluster_s_token(tiny_model):
    async def test():
        seen = []

        class Watching(FakeScheduler):
            async def Link(self, request_iterator, context):
                seen.append(dict(context.invocation_metadata())["x-sluice-internal-token"])
                async for frame in super().Link(request_iterator, context):
                    yield frame

        async with running_router(tiny_model, Watching(), internal_token="secret"):
            assert seen == ["secret"]

    run(test())


def test_addresses_are_resolved_to_every_process_behind_them(monkeypatch):
    async def test():
        assert await resolve("127.0.0.1:5") == ["127.0.0.1:5"]
        assert await resolve("unix:/tmp/x") == ["unix:/tmp/x"]
        assert await resolve("localhost:7") == ["127.0.0.1:7"]
        loop = asyncio.get_running_loop()

        async def found(*args, **kwargs):
            v4 = [(2, 1, 6, "", (address, 9)) for address in ("10.0.0.2", "10.0.0.1")]
            return [*v4, (10, 1, 6, "", ("::1", 9, 0, 0))]

        monkeypatch.setattr(loop, "getaddrinfo", found)
        assert await resolve("schedulers.cluster:9") == ["10.0.0.1:9", "10.0.0.2:9"]

    run(test())


@pytest.mark.parametrize("addresses", [(), ("localhost",), ("host:",), ("host:0",), ("host:99999",), ("host:port",)])
def test_an_impossible_address_is_refused_by_name(addresses):
    with pytest.raises(ConfigError, match="--scheduler"):
        check_addresses(addresses)
    check_addresses(["localhost:1", "[::1]:50052", "unix:/tmp/x"])


def test_a_scheduler_that_leaves_dns_finishes_its_requests(tiny_model, monkeypatch):
    from services.router.fleet import fleet

    monkeypatch.setattr(fleet, "RESOLVE_EVERY_S", 0.02)
    known = {}

    async def resolve(address):
        return known.get(address, [address])

    monkeypatch.setattr(fleet, "resolve", resolve)

    async def test():
        old, new = FakeScheduler(answer=None), FakeScheduler()
        await new.start()
        async with running_router(tiny_model, old) as router:
            call = router.inference.Generate(ask(), timeout=5)
            request = await old.request()
            known[old.address] = [new.address]
            await until(lambda: [link.target for link in router.router.fleet.links] == [new.address])
            await router.usable(1)
            await router.generate(ask())
            assert len(new.requests) == 1
            request.tokens([9])
            request.end()
            request.release()
            assert len(ends([one async for one in call])) == 1
        await new.stop()

    run(test())
