"""Structured output at the edge: what is understood, what is refused and where, and what a scheduler is told."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import grpc
import pytest

from services.router import session
from services.router.structured import MAX_BYTES, MAX_OPTIONS, structured_of
from shared.outcome import RefusedError
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.structured import KINDS, Structured
from shared.text import grammar
from shared.text.grammar import GrammarError, check
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.router import refusal, run, running_router, until

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
NOBODY = '{"type":"object","properties":{"b":{"enum":[]}},"required":["b"]}'
WRONG = {
    "a schema that is no JSON": (pb.Structured(json_schema="{"), "json_schema", "is not JSON"),
    "a schema that is no object": (pb.Structured(json_schema="[1]"), "json_schema", "is not a JSON object"),
    "an empty schema": (pb.Structured(json_schema=""), "json_schema", "is empty"),
    "a deep schema": (pb.Structured(json_schema='{"not":' * 40 + "{}" + "}" * 40), "json_schema", "deeper than 32"),
    "a large schema": (pb.Structured(json_schema=json.dumps({"x": "y" * MAX_BYTES})), "json_schema", "exceeds"),
    "an unknown type": (
        pb.Structured(json_schema='{"type": "object", "properties": {"a/b": {"items": {"type": "no"}}}}'),
        "json_schema",
        "at /properties/a~1b/items: Invalid type: no",
    ),
    "a keyword that cannot be enforced": (
        pb.Structured(json_schema='{"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": true}]}'),
        "json_schema",
        "at /anyOf/1: Unimplemented keys",
    ),
    "a reference to nothing": (pb.Structured(json_schema='{"$ref": "#/$defs/no"}'), "json_schema", "/$defs/no"),
    "a reference to elsewhere": (pb.Structured(json_schema='{"$ref": "http://x.test/y"}'), "json_schema", "x.test"),
    "an open group": (pb.Structured(regex="a(b"), "regex", "unclosed group"),
    "look-ahead": (pb.Structured(regex="(?=a)b"), "regex", "look-around"),
    "no options": (pb.Structured(choice=pb.Choice()), "choice", "0 options"),
    "an empty option": (pb.Structured(choice=pb.Choice(options=["a", ""])), "choice", "an option is empty"),
    "too many options": (pb.Structured(choice=pb.Choice(options=["a"] * (MAX_OPTIONS + 1))), "choice", "1 to 4096"),
    "a rule that is not there": (pb.Structured(grammar="start: foo"), "grammar", 'unknown name: "foo"'),
    "no grammar at all": (pb.Structured(grammar="hello"), "grammar", "neither Lark"),
    "much GBNF": (pb.Structured(grammar='root ::= "a"\n' * 1000), "grammar", "8192 are allowed"),
    "a string that is longer than it is": (
        pb.Structured(
            json_schema='{"type":"array","items":{"minLength":5,"maxLength":2,"type":"string"},"minItems":1}'
        ),
        "json_schema",
        "at /items: Unsatisfiable schema: minLength (5) is greater than maxLength (2)",
    ),
    "a property that nothing is": (
        pb.Structured(json_schema=f'{{"type":"object","properties":{{"a":{NOBODY}}},"required":["a"]}}'),
        "json_schema",
        "at /properties/a/properties/b: Unsatisfiable schema",
    ),
    "options of llguidance": (
        pb.Structured(json_schema='{"type":"string","x-guidance":{"lenient":true}}'),
        "json_schema",
        "at /x-guidance: is not served",
    ),
    "a schema that is itself": (pb.Structured(json_schema='{"$ref":"#"}'), "json_schema", "nothing can satisfy it"),
    "multiples of a large number": (
        pb.Structured(json_schema='{"type":"array","items":{"type":"integer","multipleOf":987654321}}'),
        "json_schema",
        "at /items: fuel exhausted",
    ),
    "an expression without a match": (pb.Structured(regex=r"a[^\s\S]"), "regex", "nothing can satisfy it"),
    "a grammar without a text": (pb.Structured(grammar="start: start"), "grammar", "nothing can satisfy it"),
    "a grammar that stops short": (
        pb.Structured(grammar='start: "ab" /[^\\s\\S]/'),
        "grammar",
        "nothing can satisfy it",
    ),
    "JSON mode turned off": (pb.Structured(json_object=False), "json_object", "is true or left out"),
}


def ask(structured, **stopping):
    return pb.GenerateRequest(prompt="the fox", structured=structured, stopping=pb.Stopping(**stopping))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_its_place(name, tiny_model):
    structured, kind, told = WRONG[name]

    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask(structured))
            assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", f"structured.{kind}")
            assert told in caught.value.details()
            assert len(caught.value.details()) < 500

    run(test())


@pytest.mark.parametrize("field", ["min_tokens", "ignore_eos"])
def test_what_keeps_an_answer_from_ending_is_refused_beside_a_structure(field, tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await router.generate(ask(pb.Structured(regex="a"), **{field: 1}))
            assert refusal(caught.value)[:2] == ("INVALID_ARGUMENT", f"stopping.{field}")

    run(test())


TOLD = {
    "json_object": (pb.Structured(json_object=True), ""),
    "json_schema": (pb.Structured(json_schema=SCHEMA), SCHEMA),
    "regex": (pb.Structured(regex="[a-z]+"), "[a-z]+"),
    "choice": (pb.Structured(choice=pb.Choice(options=["a", 'é"'])), '["a","é\\""]'),
    "grammar": (pb.Structured(grammar='start: "a"'), 'start: "a"'),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["prompt", "token_ids"])
def test_the_scheduler_is_told_what_was_asked_for(kind, by, tiny_model):
    structured, text = TOLD[kind]
    given = {"prompt": "the fox"} if by == "prompt" else {"token_ids": pb.TokenIds(ids=[3, 4])}

    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            await router.generate(pb.GenerateRequest(structured=structured, **given))
            await router.generate(pb.GenerateRequest(**given))
        first, second = (request.submit for request in scheduler.requests)
        assert (first.grammar.kind, first.grammar.text) == (kind, text)
        assert not second.HasField("grammar")

    run(test())


def served(eos=(1,)):
    """Only what structured_of looks at."""
    return SimpleNamespace(eos_token_ids=frozenset(eos))


@pytest.mark.parametrize("text", ['start: <|im_start|> "a"', "start: <[123456]>", 'start: "a" <[*]>'])
def test_tokens_that_only_a_vocabulary_has_are_left_to_the_worker(text):
    check(Structured("grammar", text))


def test_two_kinds_at_once_are_refused():
    with pytest.raises(RefusedError) as caught:
        structured_of({"regex": "a", "json_object": True}, served(), min_tokens=0, ignore_eos=False)
    assert "json_object and regex exclude each other" in caught.value.refusal.message
    assert structured_of({}, served(), min_tokens=0, ignore_eos=False) is None


def test_a_model_that_cannot_end_an_answer_serves_no_structure():
    with pytest.raises(RefusedError) as caught:
        structured_of({"regex": "a"}, served(eos=()), min_tokens=0, ignore_eos=False)
    assert caught.value.refusal.name == "unsupported"


def defs(number: int, each: str) -> str:
    """A schema of so many definitions, each of which leads to the next (`NEXT`)."""
    known = ",".join(f'"{at}":' + each.replace("NEXT", f'{{"$ref":"#/$defs/{at + 1}"}}') for at in range(number))
    return f'{{"$ref":"#/$defs/0","$defs":{{{known},"{number}":{{"type":"integer"}}}}}}'


def terminals(number: int, each: str) -> str:
    lines = [f"T{at}: " + each.replace("NEXT", f"T{at + 1}") for at in range(number)]
    return "\n".join(["start: T0", *lines, f'T{number}: "y"'])


HOSTILE = {
    "a long chain of references": Structured("json_schema", defs(3500, "NEXT")),
    "a long chain of objects": Structured("json_schema", defs(1400, '{"properties":{"a":NEXT},"required":["a"]}')),
    "a long chain of arrays": Structured("json_schema", defs(3000, '{"items":NEXT}')),
    "a long chain of rules": Structured(
        "grammar", "start: r0\n" + "".join(f"r{at}:r{at + 1}\n" for at in range(2500)) + 'r2500: "y"'
    ),
    "terminals that double": Structured("grammar", terminals(255, "NEXT NEXT")),
    "thousands of terminals that double": Structured("grammar", terminals(1500, "NEXT NEXT")),
    "blank lines": Structured("grammar", "\n" * MAX_BYTES),
    "a chain of GBNF": Structured("grammar", "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(480))),
    "nested repetition": Structured("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000})"),
    "an automaton of 2^30 states": Structured("regex", "[a-z ]*a[a-z ]{30}x"),
    "thousands of properties": Structured(
        "json_schema", json.dumps({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(4000)}})
    ),
    "a product of alternatives": Structured(
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"type": "object", "required": [f"p{i}{k}"]} for k in range(2)]} for i in range(20)]}
        ),
    ),
    "a tree of references": Structured(
        "json_schema",
        json.dumps(
            {
                "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)}
                | {"d25": {"type": "null"}},
                "$ref": "#/$defs/d0",
            }
        ),
    ),
}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (terminals(256, '"x" NEXT'), "257 terminals"),
        ("start: A\n" + " _A[lazy] : /x/\n" * 300, "300 terminals"),
        ("start: r\nr: " + '"x" ' * 9000, "characters of Lark"),
    ],
)
def test_lark_has_its_own_limits(text, what):
    with pytest.raises(GrammarError, match=what):
        check(Structured("grammar", text))


def test_lark_within_its_limits_compiles():
    check(Structured("grammar", terminals(255, '"x:" NEXT') + '\nr: "A:"\n' * 1))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_costs_seconds_at_most_and_nobody_elses_time(name):
    """By CPU time, and by how much another thread works meanwhile, which must not wait for it."""
    turns, done = 0, threading.Event()

    def spin():
        nonlocal turns
        while not done.is_set():
            turns += 1
            time.sleep(0.0005)

    other = threading.Thread(target=spin)
    other.start()
    began, cpu = time.monotonic(), time.process_time()
    try:
        check(HOSTILE[name])
    except GrammarError as error:
        assert len(str(error)) < 500
    finally:
        cpu, elapsed = time.process_time() - cpu, time.monotonic() - began
        done.set()
        other.join()
    assert cpu < 5
    assert elapsed < 0.2 or turns > elapsed * 20


def test_requests_without_a_structure_do_not_wait_for_the_structures_of_others(tiny_model, monkeypatch):
    compiled = threading.Event()
    monkeypatch.setattr(session, "require_compiling", lambda structured: compiled.wait(30))

    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            slow = [asyncio.ensure_future(router.generate(ask(pb.Structured(regex="a")))) for _ in range(4)]
            try:
                await until(lambda: len(router.router.admission) == len(slow))
                async with asyncio.timeout(10):
                    await router.generate(pb.GenerateRequest(prompt="the fox"))
                assert not any(one.done() for one in slow)
            finally:
                compiled.set()
            await asyncio.gather(*slow)

    run(test())


def test_as_many_options_compile_as_are_allowed():
    check(Structured("choice", json.dumps([f"option {number}" for number in range(MAX_OPTIONS)])))


def test_a_structure_that_was_sent_before_is_not_compiled_again(monkeypatch):
    compiled, fault_in = [], grammar._fault_in
    monkeypatch.setattr(grammar, "_fault_in", lambda text: compiled.append(text) or fault_in(text))
    good, bad = Structured("regex", "[a-z]{7}"), Structured("regex", "[^\\s\\S]{7}")
    for _ in range(2):
        check(good)
        with pytest.raises(GrammarError, match="nothing"):
            check(bad)
    assert len(compiled) == 2
