"""Whatever arrives at the door: a documented status, nothing for the scheduler, neighbours undisturbed."""

import asyncio
import math
import random

import grpc

from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import ids, run, running_router
from tests.counts import count

GENERATE = "/sluice.v1.Inference/Generate"
DOCUMENTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
}
IN_FLIGHT = 16


def seeds():
    """Messages to mutate; all of them valid, and none of them servable, so that nothing may reach the scheduler."""
    user = pb.ChatMessage(role="user", content="hi")
    tuned = pb.Sampling(temperature=0.5, top_p=0.5, top_k=3, seed=7, logit_bias={1: 2.0}, n=2)
    return [
        pb.GenerateRequest(prompt="the fox " * 4, model="none", sampling=tuned),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(900))),
        pb.GenerateRequest(chat=pb.Chat(messages=[user] * 3, tools_json="[{", template_kwargs_json="{}")),
        pb.GenerateRequest(prompt="x", stopping=pb.Stopping(max_tokens=0, stop=["", "a"], stop_token_ids=[4000])),
        pb.GenerateRequest(prompt="x", structured=pb.Structured(regex="a+"), response=pb.ResponseOptions(logprobs=99)),
    ]


def mutated(rng, data):
    """`data` after a few flips, cuts, insertions and repetitions."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 8)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 8))
        else:
            data[at:at] = data[at : at + 16] * rng.randrange(1, 4)
    return bytes(data)


async def outcome(stub, request):
    """The status that a call ends with, and whether the request was accepted."""
    accepted = False
    try:
        async for response in stub(request, timeout=10):
            accepted = accepted or response.HasField("accepted")
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details(), accepted
    return grpc.StatusCode.OK, "", accepted


async def neighbour(router, stop):
    """An ordinary client: returns how many of its requests were answered in full."""
    answered = 0
    while not stop.is_set():
        request = pb.GenerateRequest(
            request_id=f"neighbour-{answered}", prompt="the fox", stopping=pb.Stopping(max_tokens=4)
        )
        assert len(ids(await router.generate(request))) == 4
        answered += 1
        await asyncio.sleep(0.01)
    return answered


async def attack(router, scheduler, stub, requests):
    """Sends everything, a few at a time, beside a neighbour. Whatever was accepted must be what a client may ask."""
    stop = asyncio.Event()
    beside = asyncio.create_task(neighbour(router, stop))
    gate, accepted = asyncio.Semaphore(IN_FLIGHT), 0

    async def one(request):
        nonlocal accepted
        async with gate:
            code, details, was_accepted = await outcome(stub, request)
        accepted += was_accepted
        assert code in DOCUMENTED or (was_accepted and code is grpc.StatusCode.OK), (code, details, request)

    async with asyncio.TaskGroup() as tasks:
        for request in requests:
            tasks.create_task(one(request))
    stop.set()
    answered = await beside
    strangers = [one for one in scheduler.requests if not one.request_id.startswith("neighbour-")]
    assert answered > 0
    assert len(strangers) == accepted
    await router.idle()
    return accepted


def raw_stub(router):
    return router.channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)


def test_mutated_messages_end_in_documented_statuses(tiny_model):
    async def test():
        rng = random.Random(11)
        originals = [message.SerializeToString() for message in seeds()]
        requests = (mutated(rng, rng.choice(originals)) for _ in range(count("fuzz_messages")))
        scheduler = FakeScheduler(answer=lambda request, index: [9, 10, 11, 12])
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=64) as router:
            await attack(router, scheduler, raw_stub(router), requests)

    run(test(), timeout_s=900)


OTHER_METHODS = [
    "/sluice.v1.Inference/ListModels",
    "/sluice.v1.Inference/Abort",
    "/sluice.v1.Control/GetServerInfo",
    "/sluice.v1.Control/GetLoad",
    "/grpc.health.v1.Health/Check",
]


def test_noise_on_the_other_methods_is_refused_or_answered(tiny_model):
    async def test():
        rng = random.Random(13)
        allowed = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        async with running_router(tiny_model, FakeScheduler()) as router:
            for number in range(count("fuzz_messages") // 10):
                method = OTHER_METHODS[number % len(OTHER_METHODS)]
                call = router.channel.unary_unary(method)(rng.randbytes(rng.randrange(40)), timeout=10)
                assert await call.code() in allowed, method

    run(test(), timeout_s=900)


FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 1e30, 1.0, 2.5, -100.5]
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
COUNTS = [0, 1, 16, 17, 2**31, 2**32 - 1]
TEXTS = ["", "a", "\x00", "é" * 200, "{", "[]", "x" * 70_000, "🙂" * 3]


def parameters(rng):
    """A request whose every field is drawn from values at and beyond the borders; most are refused."""
    sampling = pb.Sampling(
        **{name: rng.choice(FLOATS) for name in ("temperature", "top_p", "min_p") if rng.random() < 0.3},
        **{name: rng.choice(FLOATS) for name in PENALTIES if rng.random() < 0.3},
    )
    if rng.random() < 0.3:
        sampling.seed = rng.choice([0, 1, 2**63, 2**64 - 1])
    if rng.random() < 0.3:
        sampling.top_k = rng.choice([-1, 0, 5, 2**31 - 1, -(2**31)])
    if rng.random() < 0.3:
        sampling.n = rng.choice(COUNTS)
    if rng.random() < 0.3:
        sampling.logit_bias[rng.choice([0, 399, 400, 2**32 - 1])] = rng.choice(FLOATS)
    stopping = pb.Stopping(min_tokens=rng.choice([0, 0, 0, 3, 600, 2**32 - 1]))
    if rng.random() < 0.5:
        stopping.max_tokens = rng.choice(COUNTS)
    stopping.stop.extend(rng.choice(TEXTS) for _ in range(rng.choice([0, 0, 1, 2, 17])))
    stopping.stop_token_ids.extend(rng.choice([0, 399, 400, 2**32 - 1]) for _ in range(rng.choice([0, 0, 1, 300])))
    request = pb.GenerateRequest(sampling=sampling, stopping=stopping, priority=rng.choice([0, -(2**31), 2**31 - 1]))
    if rng.random() < 0.3:
        request.response.logprobs = rng.choice(COUNTS)
    if rng.random() < 0.2:
        request.response.prompt_logprobs = rng.choice(COUNTS)
    if rng.random() < 0.2:
        request.request_id = rng.choice(["a", "a b", "x" * 129, "\n", "ü"])
    put_input(rng, request)
    return request


def put_input(rng, request):
    kind = rng.randrange(4)
    if kind == 0:
        request.prompt = rng.choice(TEXTS)
    elif kind == 1:
        request.token_ids.ids.extend(rng.choice([0, 5, 399, 400, 2**32 - 1]) for _ in range(rng.choice([0, 1, 4, 600])))
    elif kind == 2:
        for _ in range(rng.choice([0, 1, 3])):
            request.chat.messages.add(role=rng.choice(["user", "assistant", "robot", ""]), content=rng.choice(TEXTS))
        request.chat.tools_json = rng.choice(["", "[]", "[{}]", "{", "null"])
        request.chat.template_kwargs_json = rng.choice(["", "{}", '{"messages": 1}', '{"bos_token": 7}', "[]"])


def test_parameters_at_and_beyond_their_borders_end_in_documented_statuses(tiny_model):
    async def test():
        rng = random.Random(12)
        requests = (parameters(rng) for _ in range(count("fuzz_parameters")))
        scheduler = FakeScheduler(answer=lambda request, index: [9, 10, 11, 12])
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=64) as router:
            accepted = await attack(router, scheduler, router.inference.Generate, requests)
            assert accepted > 0
            for request in scheduler.requests:
                assert all(token_id < 400 for token_id in request.token_ids)
                assert math.isfinite(request.submit.sampling.temperature)

    run(test(), timeout_s=900)
