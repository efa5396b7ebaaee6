"""/v1/chat/completions: what the template is given, and what the client reads."""

import asyncio

import pytest

from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import answer_next, asking, events, texts
from tests.builders.router import run, running_router
from tests.builders.tiny_text import write_tiny_model
from tests.router.http.test_completions import logprob

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the fox"}]


async def prompt_of(client, scheduler, tokenizer, **ask) -> str:
    """What the model is given."""
    said = await client.post(PATH, json={"messages": HELLO, "max_tokens": 1, **ask})
    assert said.status_code == 200, said.text
    return tokenizer.decode(scheduler.requests[-1].token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_answered_by_the_assistant(tiny_model, stream):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"messages": HELLO, "max_completion_tokens": 3, "n": 2, "stream": stream}
            said = await client.post(PATH, json=ask | ({"stream_options": {"include_usage": True}} if stream else {}))
        if stream:
            *told, last = events(said.text)
            first = {one["choices"][0]["index"]: one["choices"][0]["delta"] for one in reversed(told)}
            assert first == {index: {"role": "assistant", "content": ""} for index in (0, 1)}
            ended = [one["choices"][0] for one in told if one["choices"][0]["finish_reason"]]
            assert [(one["delta"], one["finish_reason"]) for one in ended] == [({}, "length")] * 2
            assert {one["object"] for one in told} == {"chat.completion.chunk"}
            found = texts(told)
        else:
            last = said.json()
            assert last["object"] == "chat.completion" and last["id"].startswith("chatcmpl-")
            found = {one["index"]: one["message"]["content"] for one in last["choices"]}
            assert {one["message"]["role"] for one in last["choices"]} == {"assistant"}
        assert last["usage"]["completion_tokens"] == 6
        assert found == {0: "the", 1: "the fox"}

    run(test())


def test_messages_in_parts_are_text_for_the_template(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]
            messages = [{"role": "system", "content": ""}, {"role": "user", "content": parts}]
            given = await prompt_of(client, scheduler, tokenizer, messages=messages)
        assert given == "<s><|system|></s><|user|>the\nfox</s><|assistant|>"

    run(test())


def test_a_message_is_continued_or_the_prompt_left_open(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            messages = [*HELLO, {"role": "assistant", "content": "the dog "}]
            continued = await prompt_of(
                client,
                scheduler,
                tokenizer,
                messages=messages,
                continue_final_message=True,
                add_generation_prompt=False,
            )
            bare = await prompt_of(client, scheduler, tokenizer, add_generation_prompt=False)
            both = await client.post(
                PATH, json={"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
            )
        assert continued == "<s><|user|>the fox</s><|assistant|>the dog "
        assert bare == "<s><|user|>the fox</s>"
        assert (both.status_code, both.json()["error"]["param"]) == (400, "continue_final_message")

    run(test())


def test_the_template_is_given_what_clients_name_for_it(tmp_path, tokenizer):
    import json

    async def test():
        model = write_tiny_model(tmp_path / "m")
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = (
            "{{ enable_thinking }} {{ reasoning_effort }} {{ documents[0].text }}"
            "{% for m in messages %} {{ m.role }} {{ m.name }} {{ m.tool_call_id }}{% endfor %}"
        )
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        scheduler = FakeScheduler()
        async with running_router(model, scheduler) as router, asking(router) as client:
            given = await prompt_of(
                client,
                scheduler,
                tokenizer,
                messages=[
                    {"role": "developer", "content": "x", "name": "ann"},
                    {"role": "tool", "content": "y", "tool_call_id": "c1"},
                ],
                chat_template_kwargs={"enable_thinking": False},
                reasoning_effort="low",
                documents=[{"text": "dog"}],
                tools=[],
                tool_choice="none",
                response_format={"type": "text"},
            )
        assert given == "False low dog developer ann  tool  c1"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_bytes_and_the_best(tiny_model, stream):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream}
            call = asyncio.create_task(client.post(PATH, json=ask))
            await answer_next(scheduler, 0, [341], logprobs=[logprob(-0.5, (341, -0.5), (264, -1.5))])
            said = await call
            assert scheduler.requests[0].submit.logprobs == 2
        choices = [one["choices"][0] for one in (events(said.text) if stream else [said.json()])]
        [found] = [one["logprobs"] for one in choices if one["logprobs"]]
        quick = {"token": " quick", "logprob": -0.5, "bytes": list(b" quick")}
        the = {"token": "the", "logprob": -1.5, "bytes": list(b"the")}
        assert found == {"content": [{**quick, "top_logprobs": [quick, the]}], "refusal": None}

    run(test())


def test_prompt_logprobs_and_token_ids_stand_beside_the_choices(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"messages": HELLO, "prompt_logprobs": 0, "return_token_ids": True}
            call = asyncio.create_task(client.post(PATH, json=ask))
            prompt = (await scheduler.request()).token_ids
            await answer_next(scheduler, 0, [341], prompt_logprobs=[logprob(-2, rank=2) for _ in prompt[1:]])
            told = (await call).json()
            chunks = events((await chunks_of(client, scheduler)).text)
        assert told["prompt_token_ids"] == prompt == chunks[0]["prompt_token_ids"]
        assert told["choices"][0]["token_ids"] == [341]
        assert [None if one is None else list(one) for one in told["prompt_logprobs"]] == [
            None,
            *([str(token_id)] for token_id in prompt[1:]),
        ]

    async def chunks_of(client, scheduler):
        ask = {"messages": HELLO, "return_token_ids": True, "stream": True}
        call = asyncio.create_task(client.post(PATH, json=ask))
        await answer_next(scheduler, 1, [341])
        return await call

    run(test())
