"""Structured output as OpenAI's and vLLM's clients ask for it: what the scheduler is told, and how errors name it."""

import asyncio
import json

import pytest

from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import asking
from tests.builders.router import run, running_router
from tests.router.http.test_refusals import CHATS, COMPLETIONS, HELLO, told

SCHEMA = {"type": "object", "properties": {"é": {"const": 12345678901234567890123}, "a": {"minimum": 1.0}}}
WRONG_TYPE = {"type": "object", "properties": {"a": {"type": "no"}}}


def by_format(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}}


ASKED = [
    # what is asked for, the kind and the text that the scheduler is told
    ({"response_format": {"type": "json_object"}}, "json_object", ""),
    (by_format(SCHEMA), "json_schema", SCHEMA),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json_schema", SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA),
    ({"structured_outputs": {"json": {}, "disable_additional_properties": False}}, "json_schema", {}),
    ({"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["a", "é"]}}, "choice", ["a", "é"]),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
    ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ({"guided_json": SCHEMA, "guided_regex": None}, "json_schema", SCHEMA),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a", "é"]}, "choice", ["a", "é"]),
    ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
]
NOTHING = [
    {"response_format": None, "structured_outputs": None, "guided_json": None, "guided_choice": None},
    {"response_format": {"type": "text"}},
    {"structured_outputs": {"json_object": False, "choice": None}},
]
WRONG = [
    # what is asked for, param, code, what the message says
    ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported", "structural_tag"),
    ({"response_format": {"type": 5}}, "response_format.type", "invalid_argument", "expected `str`"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_argument", "schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", None, "schema"),
    (by_format([1]), "response_format.json_schema.schema", "invalid_argument", "expected `object"),
    (
        by_format(WRONG_TYPE),
        "response_format",
        "invalid_argument",
        "response_format: at /properties/a: Invalid type: no",
    ),
    ({"structured_outputs": {"json": WRONG_TYPE}}, "structured_outputs.json", "invalid_argument", "at /properties/a"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_argument", "is not JSON"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "invalid_argument", "is empty"),
    ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "invalid_argument", "unclosed group"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_argument", "0 options"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", "invalid_argument", "expected `str`"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "invalid_argument", "neither Lark"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unsupported", "not served"),
    (
        {"structured_outputs": {"json": {}, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
        "unsupported",
        "additionalProperties",
    ),
    ({"structured_outputs": "a+"}, "structured_outputs", "invalid_argument", "expected `object"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs.choice",
        "invalid_argument",
        "structured_outputs.regex and structured_outputs.choice exclude each other",
    ),
    (by_format({}) | {"guided_regex": "a"}, "guided_regex", "invalid_argument", "response_format and guided_regex"),
    ({"guided_json": {"not": SCHEMA}}, "guided_json", "invalid_argument", "guided_json: "),
    ({"guided_json": {"a": [[[{}]]] * 2, "b": json.loads("[" * 40 + "]" * 40)}}, "guided_json", None, "deeper than 32"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "invalid_argument", "look-around"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "invalid_argument", "an option is empty"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "invalid_argument", "foo"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "invalid_argument", "min_tokens: "),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_argument", "ignore_eos: "),
]


def request(path: str, **fields) -> dict:
    return ({"prompt": "the fox"} if path == COMPLETIONS else {"messages": HELLO}) | fields


def meant(kind: str, text: str):
    return json.loads(text) if kind in ("json_schema", "choice") else text


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_every_spelling_reaches_the_scheduler(tiny_model, path):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            for ask, kind, value in ASKED:
                said = await client.post(path, json=request(path, **ask))
                assert said.status_code == 200, (ask, said.text)
                grammar = scheduler.requests[-1].submit.grammar
                assert (grammar.kind, meant(kind, grammar.text)) == (kind, value), ask
        assert len(scheduler.requests) == len(ASKED)

    run(test())


def test_the_order_of_properties_is_the_clients(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            await client.post(COMPLETIONS, json=request(COMPLETIONS, **by_format(SCHEMA)))
        assert list(json.loads(scheduler.requests[0].submit.grammar.text)["properties"]) == ["é", "a"]

    run(test())


def test_what_asks_for_nothing_tells_the_scheduler_nothing(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            for ask in NOTHING:
                assert (await client.post(COMPLETIONS, json=request(COMPLETIONS, **ask))).status_code == 200
        assert not any(one.submit.HasField("grammar") for one in scheduler.requests)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_refused_by_the_name_that_the_client_gave_it(tiny_model, stream):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            for ask, param, code, message in WRONG:
                said = await client.post(CHATS, json=request(CHATS, stream=stream, **ask))
                assert told(said) == (400, param, code or "invalid_argument"), (ask, said.text)
                assert message in said.json()["error"]["message"], (ask, said.text)
        assert scheduler.requests == []

    run(test())


def test_what_a_worker_cannot_compile_is_named_as_the_client_named_it(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            call = asyncio.create_task(client.post(COMPLETIONS, json=request(COMPLETIONS, guided_regex="a+")))
            (await scheduler.request()).release("invalid_argument", message="too large", field="structured.regex")
            assert told(await call) == (400, "guided_regex", "invalid_argument")

    run(test())
