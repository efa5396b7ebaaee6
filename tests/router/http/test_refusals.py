"""What is refused, in OpenAI's shape, naming the parameter."""

import asyncio
import json

import pytest

from shared.outcome import REFUSALS
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import answer_next, asking
from tests.builders.router import run, running_router
from tests.builders.scrape import scrape
from tests.builders.tiny_text import write_tiny_model

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the fox"}]

WRONG = [
    # path, what differs from a request that is served, status, param, code
    (COMPLETIONS, {"prompt": None}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": ["a", 5]}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": [5, "a"]}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": [5, -1]}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": [400]}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"prompt": [5] * 600}, 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, {"prompt": "fox " * 600}, 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, {"prompt": ["a"] * 1025}, 400, "prompt", "invalid_argument"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", "invalid_argument"),
    (COMPLETIONS, {"max_tokens": "9"}, 400, "max_tokens", "invalid_argument"),
    (COMPLETIONS, {"min_tokens": 17}, 400, "min_tokens", "invalid_argument"),
    (COMPLETIONS, {"temperature": 2.5}, 400, "temperature", "invalid_argument"),
    (COMPLETIONS, {"temperature": "hot"}, 400, "temperature", "invalid_argument"),
    (COMPLETIONS, {"top_p": 0}, 400, "top_p", "invalid_argument"),
    (COMPLETIONS, {"top_k": -2}, 400, "top_k", "invalid_argument"),
    (COMPLETIONS, {"seed": 2**64}, 400, "seed", "invalid_argument"),
    (COMPLETIONS, {"seed": -(2**63) - 1}, 400, "seed", "invalid_argument"),
    (COMPLETIONS, {"n": 17}, 400, "n", "invalid_argument"),
    (COMPLETIONS, {"cache_salt": ""}, 400, "cache_salt", "invalid_argument"),
    (COMPLETIONS, {"cache_salt": "é" * 129}, 400, "cache_salt", "invalid_argument"),
    (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "invalid_argument"),
    (COMPLETIONS, {"logprobs": True}, 400, "logprobs", "invalid_argument"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "invalid_argument"),
    (COMPLETIONS, {"logit_bias": {"five": 1}}, 400, "logit_bias", "invalid_argument"),
    (COMPLETIONS, {"logit_bias": {"5": 101}}, 400, "logit_bias", "invalid_argument"),
    (COMPLETIONS, {"logit_bias": {"400": 1}}, 400, "logit_bias", "invalid_argument"),
    (COMPLETIONS, {"stop": ["x"] * 17}, 400, "stop", "invalid_argument"),
    (COMPLETIONS, {"stop": [5]}, 400, "stop[0]", "invalid_argument"),
    (COMPLETIONS, {"stop": ""}, 400, "stop", "invalid_argument"),
    (COMPLETIONS, {"stop_token_ids": [400]}, 400, "stop_token_ids", "invalid_argument"),
    (COMPLETIONS, {"priority": 2**31}, 400, "priority", "invalid_argument"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_argument"),
    (COMPLETIONS, {"request_id": "a b"}, 400, "request_id", "invalid_argument"),
    (COMPLETIONS, {"model": "other"}, 404, "model", "model_not_found"),
    (COMPLETIONS, {"best_of": 2}, 400, "best_of", "unsupported"),
    (COMPLETIONS, {"suffix": "x"}, 400, "suffix", "unsupported"),
    (COMPLETIONS, {"use_beam_search": True}, 400, "use_beam_search", "unsupported"),
    (COMPLETIONS, {"include_timing": True, "prompt": ["a", "b"]}, 400, "include_timing", "invalid_argument"),
    (CHATS, {"messages": []}, 400, "messages", "invalid_argument"),
    (CHATS, {"messages": [{"content": "x"}]}, 400, "messages[0].role", "invalid_argument"),
    (CHATS, {"messages": [*HELLO, {"role": "user", "content": 5}]}, 400, "messages[1].content", "invalid_argument"),
    (CHATS, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", "invalid_argument"),
    (
        CHATS,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        400,
        "messages[0].content[0]",
        "unsupported",
    ),
    (CHATS, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported"),
    (CHATS, {"tool_choice": "required"}, 400, "tool_choice", "invalid_argument"),
    (CHATS, {"functions": [{"name": "f"}]}, 400, "functions", "unsupported"),
    (CHATS, {"chat_template": "{{ 1 }}"}, 400, "chat_template", "unsupported"),
    (CHATS, {"top_logprobs": 3}, 400, "top_logprobs", "invalid_argument"),
    (CHATS, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_argument"),
    (CHATS, {"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_argument"),
    (CHATS, {"max_tokens": 0}, 400, "max_tokens", "invalid_argument"),
    (CHATS, {"thinking_token_budget": 0}, 400, "thinking_token_budget", "unsupported"),
]


def told(said) -> tuple[int, str | None, str]:
    """Status, param and code of an error in OpenAI's shape."""
    body = said.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert error["message"] and error["type"]
    return said.status_code, error["param"], error["code"]


def test_what_does_not_fit_is_refused_by_name(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            for path, wrong, status, param, code in WRONG:
                ask = {"prompt": "the fox"} if path == COMPLETIONS else {"messages": HELLO}
                said = await client.post(path, json=ask | wrong)
                assert said.status_code == status, (wrong, said.text)
                assert told(said) == (status, param, code), (wrong, said.text)
                assert param is not None and param.partition("[")[0] in said.json()["error"]["message"]
            counted = await asyncio.to_thread(scrape, router.http)
            rejected = counted.labels("admission_rejections_total", "reason")
            assert sum(rejected.values()) == len(WRONG)
            assert rejected["unsupported"] == sum(code == "unsupported" for *_, code in WRONG)

    run(test())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 5000])
def test_a_body_that_is_not_a_request_is_refused(tiny_model, body):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize"):
                said = await client.post(path, content=body, headers={"content-type": "application/json"})
                assert told(said)[0] == 400

    run(test())


def test_a_body_that_does_not_say_it_is_json_is_refused(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            body = json.dumps({"prompt": "the fox"}).encode()
            for headers in ({}, {"content-type": "text/plain"}):
                said = await client.post(COMPLETIONS, content=body, headers=headers)
                assert told(said) == (400, "content-type", "invalid_argument")
            kind = {"content-type": "Application/JSON; charset=utf-8"}
            assert (await client.post(COMPLETIONS, content=body, headers=kind)).status_code == 200

    run(test())


def test_a_request_too_large_is_refused_however_it_is_sent(tiny_model):
    async def test():
        small = running_router(tiny_model, FakeScheduler(), max_request_bytes=2000)
        async with small as router, asking(router) as client:
            ask = json.dumps({"prompt": "x" * 3000}).encode()

            async def in_pieces():
                for start in range(0, len(ask), 500):
                    yield ask[start : start + 500]

            for body in (ask, in_pieces()):
                said = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
                assert told(said) == (413, None, "message_too_large")
            assert (await client.post(COMPLETIONS, json={"prompt": "fox"})).status_code == 200

    run(test())


def test_paths_and_methods_that_are_not_served_are_errors_of_the_same_shape(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            assert told(await client.get("/v1/nothing")) == (404, None, "not_found")
            assert told(await client.post("/v1/embeddings", json={})) == (404, None, "not_found")
            said = await client.get(COMPLETIONS)
            assert told(said) == (405, None, "method_not_allowed")
            assert said.headers["allow"] == "POST"

    run(test())


def test_a_full_router_says_when_to_try_again(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_num_queued_reqs=2) as router, asking(router) as client:
            call = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": ["the", "fox"]}))
            for number in range(2):
                await scheduler.request(number)
            said = await client.post(COMPLETIONS, json={"prompt": "the fox"})
            assert told(said) == (429, None, "queue_full")
            assert (said.headers["retry-after"], said.headers["retry-after-ms"]) == ("1", "1000")
            several = await client.post(COMPLETIONS, json={"prompt": ["the", "fox"], "stream": True})
            assert told(several) == (429, None, "queue_full")
            for number in range(2):
                await answer_next(scheduler, number, [9])
            assert (await call).status_code == 200

    run(test())


def test_without_a_scheduler_it_is_unavailable(tiny_model):
    async def test():
        async with running_router(tiny_model, usable=0) as router, asking(router) as client:
            said = await client.post(COMPLETIONS, json={"prompt": "the fox"})
            assert told(said) == (503, None, "no_scheduler")
            assert int(said.headers["retry-after"]) >= 1
            assert (await client.get("/health")).status_code == 503

    run(test())


def test_a_request_id_goes_in_and_out_and_is_used_once_at_a_time(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            headers = {"x-request-id": "mine"}
            call = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "the fox"}, headers=headers))
            assert (await scheduler.request()).request_id == "mine"
            again = await client.post(COMPLETIONS, json={"prompt": "the fox"}, headers=headers)
            assert told(again) == (409, "request_id", "request_id_in_use")
            assert again.headers["x-request-id"] == "mine"
            await answer_next(scheduler, 0, [9])
            assert (await call).headers["x-request-id"] == "mine"

    run(test())


def test_what_the_scheduler_refuses_has_its_own_status_in_a_stream_too(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            for number, name in enumerate(("exceeds_kv_pool", "no_worker")):
                call = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "the fox", "stream": True}))
                (await scheduler.request(number)).release(name, message="not now", retry_after_ms=1500)
                said = await call
                assert told(said) == (REFUSALS[name].http_status, None, name)
                assert said.headers["retry-after"] == "2"

    run(test())


def test_a_model_without_a_template_has_no_chats(tmp_path):
    async def test():
        model = write_tiny_model(tmp_path / "m", chat=False)
        async with running_router(model, FakeScheduler()) as router, asking(router) as client:
            said = await client.post(CHATS, json={"messages": HELLO})
            assert told(said) == (400, "messages", "invalid_argument")

    run(test())


def test_a_failure_of_ours_has_an_id_and_no_text_of_its_own(tiny_model, monkeypatch):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            monkeypatch.setattr("services.router.http.requests.resolve", lambda *args, **kwargs: 1 / 0)
            said = await client.post(COMPLETIONS, json={"prompt": "the fox"})
            assert told(said) == (500, None, "internal")
            assert "err-" in said.text and "division" not in said.text

    run(test())
