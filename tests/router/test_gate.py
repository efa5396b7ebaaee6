"""API keys: every method is closed by default, and each key has its tenant and its limits."""

import asyncio
import hashlib
import os
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.router.allowances import Allowances
from services.router.gate import RELOAD_NS, Gate, Key
from services.router.http.guard import OPEN
from services.router.peers import PeerPlace
from shared.clock import NS_PER_S
from shared.config import ConfigError
from shared.outcome import RefusedError
from shared.rpc.sluice.v1 import control_pb2, inference_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import asking
from tests.builders.router import RunningRouter, refusal, run, running_router
from tests.router.http.test_refusals import told

COMPLETIONS = "/v1/completions"
ASK = {"prompt": "the quick fox", "max_tokens": 4}


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def write_keys(file: Path, **tables: str) -> Path:
    """A table for each name, whose key is the name; beside its hash what the text says."""
    file.write_text("".join(f'[{name}]\nsha256 = "{digest(name)}"\n{more}\n' for name, more in tables.items()))
    return file


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return tuple(bearer(key).items())


async def status_of(router: RunningRouter, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> str:
    """Of a call of any method with an empty message, which all of them take."""
    call = router.channel.unary_stream(method)
    try:
        async for _ in call(b"", timeout=5, metadata=metadata):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def methods() -> list[str]:
    services = [
        *inference_pb2.DESCRIPTOR.services_by_name.values(),
        *control_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    return [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]


def test_without_a_key_nothing_but_health_is_open_by_grpc(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(), api_key="right") as router:
            assert len(methods()) >= 7
            for method in methods():
                for sent in ((), metadata("wrong"), (("authorization", "right"),)):
                    assert await status_of(router, method, sent) == "UNAUTHENTICATED", method
            stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [one async for one in stub.ServerReflectionInfo(iter([listing]), timeout=5)]
            assert refusal(caught.value)[0] == "UNAUTHENTICATED"
            health = health_pb2_grpc.HealthStub(router.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            request = pb.GenerateRequest(prompt="the quick fox", stopping=pb.Stopping(max_tokens=4))
            assert await router.generate(request, metadata=metadata("right"))
            info = await router.control.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=metadata("right"))
            assert info.service == "router"

    run(test())


def test_without_a_key_nothing_but_health_and_the_page_is_open_by_http(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler(), api_key="right") as router, asking(router) as client:
            application = router.router._http._server.config.app._app
            paths = [route.path.replace("{name:path}", "tiny") for route in application.routes]
            assert {"/metrics", "/cluster", "/v1/models", "/tokenize", COMPLETIONS} <= set(paths)
            for path in (*paths, "/v1/of-tomorrow"):
                for method in ("GET", "POST"):
                    said = await client.request(method, path, headers=bearer("wrong"))
                    if path in OPEN:
                        assert said.status_code != 401, path
                    else:
                        assert told(said) == (401, None, "invalid_api_key"), path
                        assert said.headers["www-authenticate"] == "Bearer"
            assert (await client.post(COMPLETIONS, json=ASK, headers=bearer("right"))).status_code == 200
            said = await client.get("/metrics", headers=bearer("right"))
            assert 'admission_rejections_total{reason="unauthenticated"} 4.0' in said.text

    run(test())


def test_pages_of_allowed_origins_may_call_and_no_others(tiny_model):
    async def test():
        settings = {"api_key": "right", "allowed_origins": ("https://chat.example",)}
        async with running_router(tiny_model, FakeScheduler(), **settings) as router, asking(router) as client:
            first = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
            for origin, status in (("https://chat.example", 200), ("https://other.example", 400)):
                said = await client.options(COMPLETIONS, headers={"origin": origin, **first})
                assert said.status_code == status
                assert (said.headers.get("access-control-allow-origin") == origin) == (status == 200)
            headers = {"origin": "https://chat.example", **bearer("right")}
            said = await client.post(COMPLETIONS, json=ASK | {"stream": True}, headers=headers)
            assert said.headers["access-control-allow-origin"] == "https://chat.example"
            assert (await client.post(COMPLETIONS, json=ASK, headers=headers | bearer("wrong"))).status_code == 401

    run(test())


def test_control_and_metrics_need_an_admin(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", ann="", root="admin = true")
        served = running_router(tiny_model, FakeScheduler(), api_key_file=str(keys))
        async with served as router, asking(router) as client:
            for path in ("/metrics", "/cluster"):
                assert told(await client.get(path, headers=bearer("ann"))) == (403, None, "permission_denied")
                assert (await client.get(path, headers=bearer("root"))).status_code == 200
            for method in methods():
                expected = "PERMISSION_DENIED" if "Control" in method else ("OK", "INVALID_ARGUMENT")
                assert await status_of(router, method, metadata("ann")) in expected, method
            assert await status_of(router, "/sluice.v1.Control/GetLoad", metadata("root")) == "OK"

    run(test())


def test_a_salt_separates_cached_blocks_within_a_tenant_and_from_others(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", ann='tenant = "a"', abe='tenant = "a"', bob="")
        scheduler = FakeScheduler()
        served = running_router(tiny_model, scheduler, api_key_file=str(keys))
        async with served as router, asking(router) as client:
            for key, salt in (("ann", "s"), ("abe", "s"), ("bob", "s"), ("ann", "t"), ("ann", None)):
                said = await client.post(COMPLETIONS, json=ASK | {"cache_salt": salt}, headers=bearer(key))
                assert said.status_code == 200
            request = pb.GenerateRequest(prompt=ASK["prompt"], cache_salt="s")
            assert [response async for response in router.inference.Generate(request, metadata=metadata("ann"))]
        ann, abe, bob, other, without, by_grpc = (request.submit.salt for request in scheduler.requests)
        assert ann == abe == by_grpc and without == b"a"
        assert len({ann, bob, other, without}) == 4

    run(test())


def test_a_tenants_requests_are_its_own(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", ann='tenant = "a"', abe='tenant = "a"', bob="")
        scheduler = FakeScheduler(answer=None)
        served = running_router(tiny_model, scheduler, api_key_file=str(keys))
        async with served as router, asking(router) as client:
            ask = ASK | {"request_id": "same"}
            calls = [
                asyncio.create_task(client.post(COMPLETIONS, json=ask, headers=bearer(key))) for key in ("ann", "bob")
            ]
            requests = [await scheduler.request(number) for number in range(2)]
            assert {request.submit.salt for request in requests} == {b"a", b"bob"}
            again = await client.post(COMPLETIONS, json=ask, headers=bearer("abe"))
            assert told(again) == (409, "request_id", "request_id_in_use")
            abort = pb.AbortRequest(request_id="same")
            assert (await router.inference.Abort(abort, metadata=metadata("abe"))).found
            answers = dict(zip(("ann", "bob"), calls, strict=True))
            assert (await answers["ann"]).json()["error"]["code"] == "cancelled"
            assert not answers["bob"].done()
            assert (await router.inference.Abort(abort, metadata=metadata("bob"))).found
            await answers["bob"]

    run(test())


def test_a_key_has_limits_of_its_own(tiny_model, tmp_path):
    async def test():
        limits = {"few": "max_requests = 1", "small": "max_request_bytes = 60", "slow": "tokens_per_minute = 10"}
        keys = write_keys(tmp_path / "keys.toml", **limits, free="")
        scheduler = FakeScheduler(step_s=0.2)
        served = running_router(tiny_model, scheduler, api_key_file=str(keys))
        async with served as router, asking(router) as client:

            async def ask(key: str, **more):
                return await client.post(COMPLETIONS, json=ASK | more, headers=bearer(key))

            first = asyncio.create_task(ask("few"))
            await scheduler.request()
            said = await ask("few")
            assert told(said) == (429, None, "quota_exceeded") and int(said.headers["retry-after"]) >= 1
            assert (await ask("free", max_tokens=1)).status_code == 200
            assert (await first).status_code == 200
            assert (await ask("few", max_tokens=1)).status_code == 200
            assert (await ask("small", max_tokens=1)).status_code == 200
            assert told(await ask("small", stop=["x" * 60])) == (413, None, "message_too_large")
            request = pb.GenerateRequest(prompt="the quick fox " * 9)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(request, metadata=metadata("small"))
            assert refusal(caught.value)[0] == "INVALID_ARGUMENT"
            assert (await ask("slow", max_tokens=8)).status_code == 200  # 4 of prompt and 8: two more than there were
            said = await ask("slow", max_tokens=1)
            assert told(said) == (429, None, "quota_exceeded")
            assert 6 <= int(said.headers["retry-after"]) <= 19  # ten a minute: three tokens are 18 s

    run(test())


def test_tokenizing_counts_as_a_request_of_its_key(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", few="max_requests = 1", small="max_request_bytes = 60", free="")
        asks: list[tuple[str, dict]] = [("/tokenize", {"prompt": "the fox"}), ("/detokenize", {"tokens": [5]})]
        scheduler = FakeScheduler(step_s=0.2)
        served = running_router(tiny_model, scheduler, api_key_file=str(keys))
        async with served as router, asking(router) as client:

            async def ask(path: str, body: dict, key: str) -> tuple[int, str | None, str | None]:
                said = await client.post(path, json=body, headers=bearer(key))
                return told(said) if said.status_code != 200 else (200, None, None)

            answering = asyncio.create_task(ask(COMPLETIONS, ASK, "few"))
            await scheduler.request()
            for path, body in asks:
                assert await ask(path, body, "few") == (429, None, "quota_exceeded")
                assert await ask(path, body, "free") == await ask(path, body, "small") == (200, None, None)
                large = body | {"more": "x" * 60}
                assert await ask(path, large, "small") == (413, None, "message_too_large")
            assert (await answering)[0] == 200
            for path, body in asks * 2:
                assert (await ask(path, body, "few"))[0] == 200

    run(test())


def test_a_key_may_be_kept_from_urgent_priorities(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", batch="min_priority = 5", calm="min_priority = 0", free="")
        scheduler = FakeScheduler()
        served = running_router(tiny_model, scheduler, api_key_file=str(keys))
        async with served as router, asking(router) as client:
            for key, asked, given in [
                *(("batch", None, 5), ("batch", 0, 5), ("batch", 7, 7), ("batch", 4, None), ("batch", -1, None)),
                *(("calm", None, 0), ("calm", 2, 2), ("calm", -1, None), ("free", -9, -9)),
            ]:
                said = await client.post(COMPLETIONS, json=ASK | {"priority": asked}, headers=bearer(key))
                if given is None:
                    assert told(said) == (403, "priority", "permission_denied"), (key, asked)
                    request = pb.GenerateRequest(prompt="the quick fox", priority=asked)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await router.generate(request, metadata=metadata(key))
                    assert refusal(caught.value)[0] == "PERMISSION_DENIED"
                else:
                    assert said.status_code == 200
                    assert scheduler.requests[-1].submit.priority == given

    run(test())


class Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def test_keys_are_read_again_when_their_file_changes(tmp_path):
    clock = Clock()
    file = write_keys(tmp_path / "keys.toml", ann="")
    gate = Gate("", str(file), clock)
    assert gate.key_of("Bearer ann").tenant == "ann"
    write_keys(file, bob="max_requests = 3")
    os.utime(file, ns=(1, 1))
    assert gate.key_of("bearer ann")  # not yet looked at again
    clock.now_ns += RELOAD_NS
    assert gate.key_of("Bearer bob").max_requests == 3
    with pytest.raises(RefusedError):
        gate.key_of("Bearer ann")
    for broken in ("[", '[ann]\nsha256 = "x"\n'):
        file.write_text(broken)
        clock.now_ns += RELOAD_NS
        assert gate.key_of("Bearer bob")
    file.unlink()
    clock.now_ns += RELOAD_NS
    assert gate.key_of("Bearer bob")


def test_more_prompts_than_may_be_in_flight_are_refused_as_they_will_always_be(tiny_model, tmp_path):
    async def test():
        keys = write_keys(tmp_path / "keys.toml", few="max_requests = 2", free="")
        served = running_router(tiny_model, FakeScheduler(), api_key_file=str(keys), max_num_queued_reqs=3)
        async with served as router, asking(router) as client:
            for key, most in (("few", 2), ("free", 3)):
                ask = {"prompt": ["the fox"] * (most + 1), "max_tokens": 1}
                said = await client.post(COMPLETIONS, json=ask, headers=bearer(key))
                assert told(said) == (400, "prompt", "invalid_argument")
                assert f"{most} may be in flight" in said.json()["error"]["message"]
                ask["prompt"].pop()
                assert (await client.post(COMPLETIONS, json=ask, headers=bearer(key))).status_code == 200

    run(test())


def test_the_processes_of_a_router_share_out_what_a_key_may():
    clock = Clock()
    third = Allowances(clock, 3)
    key = Key(name="ann", max_requests=4, tokens_per_minute=90)
    third.enter(key)
    third.enter(key)
    with pytest.raises(RefusedError, match=r"2 requests .* 3 processes, which share 4"):
        third.enter(key)
    third.leave(key)
    third.spend(key, 30)
    with pytest.raises(RefusedError, match=r"30 tokens .* 3 processes, which share 90"):
        third.enter(key)
    clock.now_ns += 2 * NS_PER_S + 1  # a token of these thirty comes back every two seconds
    third.enter(key)
    Allowances(clock, 8).enter(Key(name="bob", max_requests=1))  # one at least


def test_a_process_of_a_router_knows_how_many_share(tiny_model, tmp_path):
    async def test():
        place = PeerPlace(str(tmp_path), 0, 3)
        async with running_router(tiny_model, FakeScheduler(), place=place) as router:
            assert router.router.admission.allowances.max_requests(Key(max_requests=7)) == 3

    run(test())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot use"),
        ("[ann]\n", "sha256"),
        ('[ann]\nsha256 = "secret"\n', r"\[ann\] sha256 is not"),
        (f'[ann]\nsha256 = "{digest("a")}"\nlimit = 3\n', "limit"),
        (f'[ann]\nsha256 = "{digest("a")}"\nmax_requests = -1\n', "max_requests"),
        (f'[ann]\nsha256 = "{digest("a")}"\nmax_request_bytes = -1\n', "max_request_bytes"),
        (f'[ann]\nsha256 = "{digest("a")}"\ntokens_per_minute = -1\n', "tokens_per_minute"),
        (f'[ann]\nsha256 = "{digest("a")}"\nmin_priority = {2**31}\n', "min_priority"),
        (f'[ann]\nsha256 = "{digest("a")}"\n[bob]\nsha256 = "{digest("a")}"\n', "the same key"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_at_the_start(tmp_path, text, said):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        Gate("", str(file), Clock())
    assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read"):
        Gate("", str(tmp_path / "missing.toml"), Clock())


@pytest.mark.parametrize(
    "sent", ["", "Bearer", "Bearer ", "Basic ann", "ann", f"Bearer {5000 * 'x'}", "Bearer ann ann"]
)
def test_what_is_no_key_opens_nothing(tmp_path, sent):
    gate = Gate("", str(write_keys(tmp_path / "keys.toml", ann="")), Clock())
    with pytest.raises(RefusedError) as caught:
        gate.key_of(sent)
    assert caught.value.refusal.name == "unauthenticated"
