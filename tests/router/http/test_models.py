"""The paths beside completions: models, tokens, health, version, metrics; and what the log and the trace say."""

import asyncio

import structlog

from shared import __version__
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import asking
from tests.builders.router import run, running_router
from tests.router.http.test_refusals import told


def test_models_are_listed_by_their_served_names(tiny_model):
    async def test():
        names = ("org/tiny", "second")
        named = running_router(tiny_model, FakeScheduler(), served_model_name=names)
        async with named as router, asking(router) as client:
            listed = (await client.get("/v1/models")).json()
            one = (await client.get("/v1/models/org/tiny")).json()
            missing = await client.get("/v1/models/third")
            answer = (await client.post("/v1/completions", json={"prompt": "fox", "model": "second"})).json()
        assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == list(names)
        assert one == listed["data"][0]
        assert (one["object"], one["owned_by"], one["max_model_len"]) == ("model", "sluice", 512)
        assert told(missing) == (404, "model", "model_not_found")
        assert answer["model"] == "second"

    run(test())


def test_text_and_chats_become_tokens_and_text_again(tiny_model, tokenizer):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            text = (await client.post("/tokenize", json={"prompt": "the 世", "return_token_strs": True})).json()
            bare = (await client.post("/tokenize", json={"prompt": "the 世", "add_special_tokens": False})).json()
            messages = [{"role": "user", "content": "the fox"}]
            chat = (await client.post("/tokenize", json={"messages": messages})).json()
            closed = (
                await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
            ).json()
            back = (await client.post("/detokenize", json={"tokens": text["tokens"]})).json()
            nothing = await client.post("/tokenize", json={})
            foreign = await client.post("/detokenize", json={"tokens": [400]})
            refused = await client.post("/tokenize", json={"messages": [{"role": "wizard", "content": "x"}]})
        assert text["tokens"] == tokenizer.encode("the 世") and text["count"] == len(text["tokens"])
        assert text["max_model_len"] == 512
        assert text["token_strs"][:2] == ["<s>", "the"]
        assert bare["tokens"] == text["tokens"][1:]
        assert tokenizer.decode(chat["tokens"], skip_special_tokens=False) == "<s><|user|>the fox</s><|assistant|>"
        assert closed["tokens"] == chat["tokens"][:-1]
        assert back == {"prompt": "<s>the 世"}
        assert told(nothing) == (400, "prompt", "invalid_argument")
        assert told(foreign) == (400, "tokens", "invalid_argument")
        assert told(refused) == (400, "messages", "invalid_argument")

    run(test())


def test_version_and_metrics_are_told(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            assert (await client.get("/version")).json() == {"version": __version__}
            assert (await client.head("/health")).status_code == 200
            said = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert said.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "sluice:prompt_tokens_total 0.0\n" in said.text

    run(test())


def test_the_log_and_the_trace_say_which_door_and_whose_trace(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            with structlog.testing.capture_logs() as lines:
                ask = {"messages": [{"role": "user", "content": "fox"}]}
                await client.post("/v1/chat/completions", json=ask, headers={"traceparent": parent})
                await asyncio.sleep(0)
            [trace] = router.router.traces.latest(9)
        [line] = [one for one in lines if one["event"] == "request"]
        assert (line["door"], line["operation"]) == ("http", "chat")
        assert line["trace_id"] == trace.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
        assert trace.parent_id.hex() == "b7ad6b7169203331"
        assert trace.spans[0].attributes["sluice.request.door"] == "http"

    run(test())
