"""Every request that is not served, with its status and details."""

import asyncio
import json
import math

import grpc
import pytest

from services.router import wire
from services.router.limits import MAX_JSON_BYTES, RANGES, Limits, check_range
from shared.outcome import REFUSALS, RefusedError
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1.inference_pb2_grpc import InferenceStub
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import ends, refusal, rest, run, running_router
from tests.builders.tiny_text import write_tiny_model


def ask(**fields):
    fields.setdefault("prompt", "the fox")
    return pb.GenerateRequest(**fields)


def chat(**fields):
    return pb.GenerateRequest(chat=pb.Chat(**fields))


USER = pb.ChatMessage(role="user", content="hi")
INVALID = {
    "request_id": ask(request_id="a b"),
    "request_id ": ask(request_id="x" * 129),
    "request_id  ": ask(request_id="ümlaut"),
    "input": pb.GenerateRequest(),
    "prompt": pb.GenerateRequest(prompt=""),
    "token_ids": pb.GenerateRequest(token_ids=pb.TokenIds()),
    "token_ids ": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[400])),
    "token_ids  ": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512)),
    "prompt ": pb.GenerateRequest(prompt="x 1 " * 400),
    "prompt  ": pb.GenerateRequest(prompt="x" * 100_000),
    "chat.messages": chat(),
    "chat": chat(messages=[pb.ChatMessage(role="robot", content="hi")]),
    "chat.tools_json": chat(messages=[USER], tools_json="{"),
    "chat.tools_json ": chat(messages=[USER], tools_json="{}"),
    "chat.tools_json  ": chat(messages=[USER], tools_json="[1]"),
    "chat.tools_json   ": chat(messages=[USER], tools_json="[" * 100_000),
    "chat.tools_json    ": chat(messages=[USER], tools_json=f'[{{"a": "{"é" * 150_000}"}}]'),
    "chat.template_kwargs_json  ": chat(messages=[USER], template_kwargs_json='{"a": [' + "1," * 150_000 + "1]}"),
    "chat.template_kwargs_json": chat(messages=[USER], template_kwargs_json="[]"),
    "chat.template_kwargs_json ": chat(messages=[USER], template_kwargs_json='{"a":' * 50 + "1" + "}" * 50),
    "sampling.logit_bias": ask(sampling=pb.Sampling(logit_bias={400: 1})),
    "sampling.logit_bias ": ask(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(1025), 1))),
    "sampling.logit_bias  ": ask(sampling=pb.Sampling(logit_bias={1: math.nan})),
    "stopping.stop": ask(stopping=pb.Stopping(stop=[""])),
    "stopping.stop ": ask(stopping=pb.Stopping(stop=["x"] * 17)),
    "stopping.stop  ": ask(stopping=pb.Stopping(stop=["é" * 129])),
    "stopping.stop_token_ids": ask(stopping=pb.Stopping(stop_token_ids=[400])),
    "stopping.stop_token_ids ": ask(stopping=pb.Stopping(stop_token_ids=range(257))),
    "stopping.min_tokens": ask(stopping=pb.Stopping(max_tokens=4, min_tokens=5)),
    "stopping.min_tokens ": ask(stopping=pb.Stopping(min_tokens=600)),
}


def test_invalid_requests_name_their_field_and_never_reach_the_scheduler(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            for field, request in INVALID.items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await router.generate(request)
                assert refusal(caught.value) == ("INVALID_ARGUMENT", field.strip(), 0), field
                assert len(caught.value.details()) < 300
            assert scheduler.requests == []
            await router.generate(ask())

    run(test())


def test_what_is_too_much_is_refused_by_its_length_alone():
    class Uncountable(dict):
        def __len__(self):
            return 10**6

        items = values = __iter__ = None

    with pytest.raises(RefusedError) as caught:
        Limits(400).check_logit_bias(Uncountable())
    assert caught.value.refusal.field == "sampling.logit_bias"
    with pytest.raises(RefusedError) as caught:
        Limits(400).check_stop([], Uncountable())
    assert caught.value.refusal.field == "stopping.stop_token_ids"


def test_json_that_is_too_long_is_not_parsed(monkeypatch):
    monkeypatch.setattr(wire.msgspec.json, "decode", None)
    with pytest.raises(RefusedError) as caught:
        wire._json("chat.tools_json", "[" + "1," * MAX_JSON_BYTES + "1]", list)
    assert str(MAX_JSON_BYTES) in caught.value.refusal.message


def outside(field):
    row = RANGES[field]
    beyond = [math.nextafter(row.low, -math.inf), math.nextafter(row.high, math.inf), math.nan, math.inf, -math.inf]
    return [*beyond, *([row.low] if row.above else [])]


@pytest.mark.parametrize("field", RANGES)
def test_every_row_of_the_table_refuses_what_is_outside_and_takes_what_is_inside(field):
    row = RANGES[field]
    assert all(value not in row for value in outside(field))
    assert row.high in row
    assert (row.low in row) is not row.above


def test_integers_of_a_range_keep_their_digits():
    assert str(RANGES["stopping.max_tokens"]) == "from 1 to 4294967295"
    assert str(RANGES["sampling.repetition_penalty"]) == "from 0.01 to 10"
    with pytest.raises(RefusedError, match="2147483648 is not allowed; it goes from 0 to 2147483647"):
        check_range("sampling.top_k", 2**31)


FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_outside_their_range_are_refused_at_the_door(tiny_model, name):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            for value in (-1000.0, 1000.0, math.nan, math.inf):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await router.generate(ask(sampling=pb.Sampling(**{name: value})))
                assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", f"sampling.{name}")

    run(test())


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("sampling.top_k", ask(sampling=pb.Sampling(top_k=-1))),
        ("sampling.n", ask(sampling=pb.Sampling(n=0))),
        ("sampling.n", ask(sampling=pb.Sampling(n=17))),
        ("stopping.max_tokens", ask(stopping=pb.Stopping(max_tokens=0))),
        ("response.logprobs", ask(response=pb.ResponseOptions(logprobs=21))),
        ("response.prompt_logprobs", ask(response=pb.ResponseOptions(prompt_logprobs=21))),
    ],
)
def test_counts_outside_their_range_are_refused_at_the_door(tiny_model, field, request_):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(request_)
            assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", field)

    run(test())


def test_a_model_that_is_not_served_is_not_found(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask(model="other"))
            assert refusal(caught.value) == ("NOT_FOUND", "", 0)
            assert "tiny" in caught.value.details()

    run(test())


def test_a_chat_without_a_template_is_refused(tmp_path):
    async def test():
        model = write_tiny_model(tmp_path / "m", chat=False)
        async with running_router(model, FakeScheduler()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(chat(messages=[USER]))
            assert refusal(caught.value) == ("INVALID_ARGUMENT", "chat", 0)

    run(test())


def test_a_live_request_id_used_twice_already_exists(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            first = router.inference.Generate(ask(request_id="twice"), timeout=5)
            request = await scheduler.request()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask(request_id="twice"))
            assert refusal(caught.value) == ("ALREADY_EXISTS", "request_id", 0)
            request.end()
            request.release()
            assert len(ends([one async for one in first])) == 1
            second = router.inference.Generate(ask(request_id="twice"), timeout=5)
            again = await scheduler.request(1)
            again.end()
            again.release()
            assert len(ends([one async for one in second])) == 1

    run(test())


def test_one_request_too_many_is_told_when_to_come_back(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=2) as router:
            calls = [router.inference.Generate(ask(), timeout=5) for _ in range(2)]
            await scheduler.request(1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask())
            assert refusal(caught.value) == ("RESOURCE_EXHAUSTED", "", 1)
            for request in list(scheduler.requests):
                request.end()
                request.release()
            for call in calls:
                [one async for one in call]
            await router.idle()
            third = asyncio.create_task(router.generate(ask()))
            request = await scheduler.request(2)
            request.end()
            request.release()
            await third

    run(test())


def test_a_refusal_comes_without_headers_so_that_grpc_may_retry_it(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        policy = {
            "name": [{"service": "sluice.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
            },
        }
        options = [("grpc.service_config", json.dumps({"methodConfig": [policy]})), ("grpc.enable_retries", 1)]
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=1) as router:
            first = router.inference.Generate(ask(), timeout=5)
            request = await scheduler.request()
            async with grpc.aio.insecure_channel(router.address, options=options) as channel:
                second = asyncio.create_task(rest(InferenceStub(channel).Generate(ask(), timeout=10)))
                await asyncio.sleep(0.02)
                request.end()
                request.release()
                await rest(first)
                again = await scheduler.request(1)
                again.end()
                again.release()
                assert len(ends(await second)) == 1

    run(test())


@pytest.mark.parametrize(
    "request_",
    [ask(model="other"), ask(stopping=pb.Stopping(max_tokens=0)), ask(prompt="x" * 100_000), ask(request_id="own")],
    ids=["not found", "invalid", "too long", "in use"],
)
def test_a_refusal_names_the_request_it_refuses(tiny_model, request_):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            live = router.inference.Generate(ask(request_id="own"), timeout=5)
            await live.read()
            call = router.inference.Generate(request_, metadata=(("x-request-id", "own"),), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(call)
            assert dict(await call.trailing_metadata())["x-request-id"] == "own"
            assert refusal(caught.value)[0] in ("NOT_FOUND", "INVALID_ARGUMENT", "ALREADY_EXISTS")
            live.cancel()

    run(test())


def test_a_request_that_ends_early_names_itself_with_its_status(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            (await scheduler.request()).release("worker_lost", retry_after_ms=250)
            first = await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(call)
            assert dict(await call.trailing_metadata())["x-request-id"] == first.accepted.request_id
            assert refusal(caught.value) == ("UNAVAILABLE", "", 0.25)

    run(test())


def test_a_request_that_is_too_large_is_refused_and_the_connection_lives(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(), max_request_bytes=10_000) as router:
            for size, status in ((10_001, "INVALID_ARGUMENT"), (200_000, "RESOURCE_EXHAUSTED")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await router.generate(ask(prompt="x" * size))
                assert caught.value.code().name == status
            await router.generate(ask())

    run(test())


def test_without_a_scheduler_a_request_is_refused_at_once(tiny_model):
    async def test():
        async with running_router(tiny_model, usable=0) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask())
            assert refusal(caught.value) == ("UNAVAILABLE", "", 1)

    run(test())


@pytest.mark.parametrize("name", REFUSALS)
def test_a_scheduler_s_refusal_becomes_its_status(tiny_model, name):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(sampling=pb.Sampling(n=2)), timeout=5)
            request = await scheduler.request()
            request.release(name, message="because", retry_after_ms=250, field="stopping.max_tokens")
            responses = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for response in call:
                    responses.append(response)
            assert refusal(caught.value) == (REFUSALS[name].grpc_status, "stopping.max_tokens", 0.25)
            assert caught.value.details() == "because"
            assert sorted(one.index for one in ends(responses)) == [0, 1]
            reasons = {one.reason for one in ends(responses)}
            assert reasons <= {pb.FINISH_REASON_ABORT, pb.FINISH_REASON_ERROR}

    run(test())


def test_a_refusal_of_an_unknown_name_is_internal(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(), timeout=5)
            (await scheduler.request()).release("from_the_future")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [one async for one in call]
            assert caught.value.code() is grpc.StatusCode.INTERNAL

    run(test())


def test_a_scheduler_that_breaks_the_contract_ends_that_request_only(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            bad = router.inference.Generate(ask(), timeout=5)
            good = router.inference.Generate(ask(), timeout=5)
            broken, sound = await scheduler.request(), await scheduler.request(1)
            if broken.request_id != (await bad.read()).accepted.request_id:
                broken, sound = sound, broken
            broken.end(reason="no such reason")
            sound.end()
            sound.release()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rest(bad)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "no such reason" not in caught.value.details()
            assert len(ends([one async for one in good])) == 1

    run(test())
