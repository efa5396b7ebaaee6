"""The HTTP door of a real cluster, asked by the clients that people have: the `openai` package and curl."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jsonschema
import openai
import pytest

from services.cli.client import Request
from shared.checkpoint import BUNDLED_FOLDER
from tests.builders.answers import ask_all
from tests.builders.cluster import RunningCluster, wait_for
from tests.builders.scrape import scrape
from tests.builders.tool_text import QWEN3

pytestmark = pytest.mark.cluster

MODEL = "bundled"
PROMPT = "def add(a, b):\n"
HELLO = [{"role": "user", "content": "Write a function that adds two numbers."}]
EXACT = {"dtype": "float32"}
"""Answers are compared between batches."""
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 16}


def connect(running: RunningCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{running.http('router')}/v1", api_key="none", max_retries=0, timeout=60)


@asynccontextmanager
async def connect_async(running: RunningCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    where = f"http://{running.http('router')}/v1"
    async with openai.AsyncOpenAI(base_url=where, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def by_grpc(running: RunningCluster, **fields) -> tuple[str, list[int]]:
    """What the other door says."""
    [answer] = ask_all(running.address, [Request(temperature=0, **{"max_tokens": 16, **fields})])
    return answer.texts[0], answer.only


def test_a_completion_is_the_same_by_both_doors_streamed_or_not(cluster) -> None:
    running = cluster(**EXACT)
    text, token_ids = by_grpc(running, prompt=PROMPT)
    with connect(running) as client:
        whole = client.completions.create(prompt=PROMPT, **GREEDY, extra_body={"return_token_ids": True})
        chunks = list(
            client.completions.create(prompt=PROMPT, **GREEDY, stream=True, stream_options={"include_usage": True})
        )
    assert whole.choices[0].text == text == "".join(one.choices[0].text for one in chunks[:-1])
    assert whole.choices[0].model_extra["token_ids"] == token_ids
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens == len(token_ids)
    assert usage.prompt_tokens_details.cached_tokens is not None


def test_a_chat_is_the_same_streamed_or_not(cluster) -> None:
    with connect(cluster(**EXACT)) as client:
        whole = client.chat.completions.create(messages=HELLO, **GREEDY)
        chunks = list(client.chat.completions.create(messages=HELLO, **GREEDY, stream=True))
        with client.chat.completions.stream(messages=HELLO, **GREEDY) as stream:
            told = [event.content for event in stream if event.type == "content.done"]
    message = whole.choices[0].message
    assert message.role == chunks[0].choices[0].delta.role == "assistant"
    assert message.content and message.content == "".join(one.choices[0].delta.content or "" for one in chunks)
    assert told == [message.content]


def test_batches_choices_and_seeds(cluster) -> None:
    with connect(cluster(**EXACT)) as client:
        ask = {"model": MODEL, "max_tokens": 8, "n": 2, "seed": 7, "temperature": 1.0}
        prompts = [PROMPT, "class Stack:\n", "import os\n"]
        first, again = (client.completions.create(prompt=prompts, **ask) for _ in range(2))
        alone = client.completions.create(prompt=prompts[1], **ask)
        tokens = client.post("/../tokenize", cast_to=object, body={"model": MODEL, "prompt": prompts[1]})
        by_tokens = client.completions.create(prompt=[tokens["tokens"]] * 2, **ask)
    assert [one.index for one in first.choices] == list(range(6))
    assert [one.text for one in first.choices] == [one.text for one in again.choices]
    assert [one.text for one in first.choices[2:4]] == [one.text for one in alone.choices]
    assert alone.choices[0].text != alone.choices[1].text
    assert [one.text for one in by_tokens.choices] == [one.text for one in alone.choices] * 2


def test_logprobs_of_answers_and_echoes(cluster) -> None:
    with connect(cluster(**EXACT)) as client:
        chat = client.chat.completions.create(messages=HELLO, **GREEDY, logprobs=True, top_logprobs=3)
        echoed = client.completions.create(prompt=PROMPT, **{**GREEDY, "max_tokens": 4}, logprobs=2, echo=True)
        text = echoed.choices[0].text
        scored = client.completions.create(prompt=text, **{**GREEDY, "max_tokens": 0}, logprobs=0, echo=True)
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert all(len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob <= 0 for one in content)
    assert b"".join(bytes(one.bytes) for one in content).decode().startswith(chat.choices[0].message.content)
    logprobs = echoed.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens).endswith(text)
    assert logprobs.text_offset[0] == 0, "the first token is special, and not shown"
    for offset, token in list(zip(logprobs.text_offset, logprobs.tokens, strict=True))[1:]:
        assert text[offset:].startswith(token)
    again = scored.choices[0]
    assert (again.text, scored.usage.completion_tokens) == (text, 0)
    assert again.logprobs.tokens == logprobs.tokens
    assert again.logprobs.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-3)


def test_errors_are_the_clients_own_exceptions(cluster) -> None:
    with connect(cluster(**EXACT)) as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(prompt=PROMPT, **{**GREEDY, "temperature": 9})
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(prompt=PROMPT, model="other")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(prompt=[5] * 100_000, **GREEDY)
        assert client.models.retrieve(MODEL).id == client.models.list().data[0].id == MODEL
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    assert missing.value.code == "model_not_found"
    assert long.value.code == "context_length_exceeded"


def test_a_closed_stream_frees_what_it_held(cluster) -> None:
    running = cluster(**EXACT)

    def num_running() -> float:
        return scrape(running.http("scheduler"))("num_requests_running")

    ask = {"model": MODEL, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with connect(running) as client:
        stream = client.completions.create(prompt=PROMPT, stream=True, **ask)
        next(iter(stream))
        assert num_running() == 1
        stream.close()
        wait_for(lambda: num_running() == 0, 5, "the request is aborted")

    async def leave() -> None:
        async with connect_async(running) as client:
            async with await client.chat.completions.create(messages=HELLO, stream=True, **ask) as stream:
                async for _ in stream:
                    break
            waiting = asyncio.create_task(client.completions.create(prompt=PROMPT, **ask))
            await asyncio.sleep(0.5)
            assert await asyncio.to_thread(num_running) == 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.to_thread(wait_for, lambda: num_running() == 0, 5, "the request is aborted")

    asyncio.run(leave())


def test_many_at_once_have_their_own_answers(cluster) -> None:
    running = cluster(**EXACT)
    prompts = [f"def f{number}(x):\n" for number in range(16)]

    async def ask() -> list[str]:
        async with connect_async(running) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(ask()) == [by_grpc(running, prompt=prompt)[0] for prompt in prompts]


def test_curl_is_answered(cluster) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    running = cluster(**EXACT)
    where = f"http://{running.http('router')}/v1/chat/completions"
    body = json.dumps({"messages": HELLO, **GREEDY})

    def curl(*args: str) -> str:
        command = ["curl", "--silent", "--show-error", "--fail-with-body", where, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told = json.loads(curl("--json", body))
    assert told["choices"][0]["message"]["content"]
    lines = curl("--no-buffer", "--json", json.dumps({**json.loads(body), "stream": True})).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-2] if line]
    assert "".join(pieces) == told["choices"][0]["message"]["content"]


def test_a_demanded_call_is_one_of_the_tools_with_arguments_of_its_schema(cluster, tmp_path) -> None:
    (tmp_path / "tools.jinja").write_text(QWEN3)
    running = cluster(**EXACT, chat_template=str(tmp_path / "tools.jinja"))
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/few"}},
        "required": ["unit", "days"],
        "additionalProperties": False,
        "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 7}},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("sun", "rain")]
    ask = {"model": MODEL, "messages": HELLO, "tools": tools, "max_tokens": 200}
    with connect(running) as client:
        for seed in range(4):
            [*calls] = demanded(client, ask, seed=seed, tool_choice="required")
            assert calls and {call.name for call in calls} <= {"sun", "rain"}
            named = {"type": "function", "function": {"name": "rain"}}
            [call] = demanded(client, ask, seed=seed, tool_choice=named, parallel_tool_calls=False)
            assert call.name == "rain"
            for one in (*calls, call):
                jsonschema.validate(json.loads(one.arguments), parameters)


def demanded(client: openai.OpenAI, ask: dict, **more) -> list:
    """The calls of an answer, which a stream of it repeats."""
    [choice] = client.chat.completions.create(**ask, **more).choices
    with client.chat.completions.stream(**ask, **more) as stream:
        [again] = stream.get_final_completion().choices
    assert again.finish_reason == choice.finish_reason != "length"
    calls = [call.function for call in choice.message.tool_calls]
    assert [(one.function.name, one.function.arguments) for one in again.message.tool_calls] == [
        (one.name, one.arguments) for one in calls
    ]
    return calls


def thinking_model(folder: Path) -> Path:
    """The bundled one, which knows a token for the end of reasoning."""
    shutil.copytree(BUNDLED_FOLDER, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<|pad|>", "</think>"))
    template = "{%- for message in messages %}{{- message.content }}{%- endfor %}{{- '<think>\\n' }}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_model_that_thinks_is_free_until_it_has_thought_and_then_follows_the_schema(cluster, tmp_path) -> None:
    running = cluster(**EXACT, model=str(thinking_model(tmp_path / "thinking")))
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    ask = {"model": "thinking", "messages": HELLO, "max_tokens": 200, "response_format": wanted}
    thoughts = []
    with connect(running) as client:
        for seed in range(4):
            asked = {**ask, "seed": seed, "logit_bias": {"2": 14}}
            [choice] = client.chat.completions.create(**asked).choices
            chunks = [one.choices[0].delta for one in client.chat.completions.create(**asked, stream=True)]
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), schema)
            for name in ("content", "reasoning"):
                streamed = "".join(getattr(one, name, None) or "" for one in chunks)
                assert streamed == (getattr(choice.message, name, None) or "")
            thoughts.append(getattr(choice.message, "reasoning", None) or "")
        [unfinished] = client.chat.completions.create(**{**ask, "max_tokens": 20}, logit_bias={"2": -100}).choices
    assert max(map(len, thoughts)) > 20
    assert unfinished.finish_reason == "length"
    assert unfinished.message.reasoning and not unfinished.message.content


def test_an_answer_follows_a_json_schema_streamed_or_not(cluster) -> None:
    running = cluster()
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}
    ask = {"model": MODEL, "messages": HELLO, "temperature": 1, "max_tokens": 128, "response_format": wanted}
    with connect(running) as client:
        answers = client.chat.completions.create(**ask, n=4).choices
        chunks = list(client.chat.completions.create(**ask, stream=True))
        chosen = client.completions.create(
            model=MODEL, prompt=PROMPT, extra_body={"structured_outputs": {"choice": ["red", "blue"]}}
        )
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"guided_regex": "a(b"})
    assert {one.finish_reason for one in answers} == {"stop"}
    texts = [one.message.content for one in answers]
    texts.append("".join(one.choices[0].delta.content or "" for one in chunks))
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert chosen.choices[0].text in ("red", "blue")
    assert caught.value.param == "guided_regex"
