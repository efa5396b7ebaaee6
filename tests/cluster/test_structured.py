"""Structured output of the bundled model, through a whole cluster, at temperature 1."""

import asyncio
import json
import random
import re
from functools import cache

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from services.cli.client import Request
from shared.checkpoint import BUNDLED_FOLDER
from shared.structured import Structured
from shared.text.grammar import compile_grammar, load_vocabulary
from shared.text.tokenizer import load_tokenizer
from tests.builders.answers import Answer, ask_all, ask_one
from tests.builders.cluster import wait_for
from tests.builders.schemas import make_schema
from tests.counts import count
from tests.faults.test_kills import kill_in_mid_stream

pytestmark = pytest.mark.cluster

EOS = 1
MAX_TOKENS = 512
AT_ONCE = 32
LEAST_STOPPED = 0.95
ROOMY = {"dtype": "float32", "max_num_seqs": 64}
CROWDED = {"dtype": "float32", "max_num_seqs": 16, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 64}
CLOSERS = (b'"', b"}", b"]", b",", b"Z", b".", b"0", b"1", b"-", b"T", b":")
"""What brings an unfinished JSON text to its end, the best first."""


@cache
def vocabulary() -> LLTokenizer:
    return load_vocabulary(load_tokenizer(BUNDLED_FOLDER).to_json(), 4096, {EOS})


def following(structured: tuple, **fields) -> Request:
    fields = {"prompt": "The value, as JSON:\n", "temperature": 1.0, "max_tokens": MAX_TOKENS, **fields}
    return Request(structured=structured, **fields)


def read_into(structured: Structured, tokens: list[int]) -> LLMatcher:
    """A fresh matcher behind the tokens of an answer, each of which it allowed."""
    matcher = compile_grammar(structured, vocabulary()).deep_copy()
    words = [token for token in tokens if token != EOS]
    assert matcher.try_consume_tokens(words) == len(words), (structured, tokens)
    return matcher


def completed(matcher: LLMatcher, tokens: list[int]) -> str:
    """The text of an unfinished answer, brought to an end that its grammar allows."""
    tokens = list(tokens)
    names = {i: vocabulary().decode_bytes([i]) for i in range(4096)}
    for _ in range(2000):
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(4096) if mask[i // 8] >> (i % 8) & 1]
        if EOS in allowed:
            return vocabulary().decode_bytes(tokens).decode()
        token = min(allowed, key=lambda i: (CLOSERS.index(names[i]) if names[i] in CLOSERS else len(CLOSERS), i))
        assert matcher.consume_token(token)
        tokens.append(token)
    raise AssertionError(f"it never ends: {vocabulary().decode_bytes(tokens)[-200:]!r}")


def assert_valid(text: str, schema: dict) -> None:
    """Formats are checked where a grammar can say them whole: a date has the shape of one, and may be the 30th of
    February, or in the year 0 that Python does not know."""
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker(("uuid", "ipv4")))


def test_answers_follow_generated_schemas(cluster) -> None:
    """Every one that stops is valid, every other one can be completed to one that is, and nearly all stop."""
    running = cluster(**ROOMY)
    total, stopped = count("structured_schemas"), 0
    for start in range(0, total, AT_ONCE):
        schemas = [make_schema(seed) for seed in range(start, min(start + AT_ONCE, total))]
        texts = [json.dumps(schema) for schema in schemas]
        requests = [following(("json_schema", text), seed=start + i) for i, text in enumerate(texts)]
        for schema, text, answer in zip(schemas, texts, ask_all(running.address, requests), strict=True):
            assert answer.status == "OK", (text, answer.error)
            matcher = read_into(Structured("json_schema", text), answer.only)
            if answer.ends[0].reason == "stop":
                stopped += 1
                assert matcher.is_accepting()
                assert_valid(answer.texts[0], schema)
            else:
                assert answer.ends[0].reason == "length"
                assert_valid(completed(matcher, answer.only), schema)
    print(f"{stopped} of {total} answers stopped by themselves")
    assert stopped >= LEAST_STOPPED * total


KINDS = {
    "json_object": ("json_object", "", lambda text: isinstance(json.loads(text), dict)),
    "regex": ("regex", "[A-Z][a-z]{2,9}, [0-9]{4}", lambda text: re.fullmatch("[A-Z][a-z]{2,9}, [0-9]{4}", text)),
    "choice": (
        "choice",
        ("red", "green and blue", "für alle"),
        lambda text: text in ("red", "green and blue", "für alle"),
    ),
    "lark": (
        "grammar",
        'start: NUM ("+" NUM){1,4}\nNUM: /[0-9]{1,3}/',
        lambda text: re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,4}", text),
    ),
    "gbnf": ("grammar", 'root ::= "yes" | "no" ("!")?', lambda text: text in ("yes", "no", "no!")),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_structure(cluster, name: str) -> None:
    kind, value, fits = KINDS[name]
    requests = [following((kind, value), seed=seed, n=3, logprobs=1) for seed in range(4)]
    answers = ask_all(cluster(**ROOMY).address, requests)
    ended = [answer.texts[i] for answer in answers for i in range(3) if answer.ends[i].reason == "stop"]
    assert len(ended) > 6
    for text in ended:
        assert fits(text), text


def variety(count: int) -> list[Request]:
    """Structured requests of all kinds, every third a plain one."""
    rng = random.Random(count)
    requests = []
    for i in range(count):
        structured = [
            ("json_schema", json.dumps(make_schema(1000 + i))),
            ("regex", "([a-z]{1,9} ){12,40}end"),
            None,
        ][i % 3]
        requests.append(
            Request(
                prompt="def " * (1 + i) + str(rng.randrange(100)),
                structured=structured,
                temperature=1.0,
                seed=i,
                max_tokens=60,
                repetition_penalty=1.1 if i % 4 == 1 else 1.0,
                top_k=50 if i % 4 == 2 else 0,
                logprobs=1,
                include_timing=True,
            )
        )
    return requests


def same(answers: list[Answer], reference: list[Answer]) -> None:
    for i, (answer, other) in enumerate(zip(answers, reference, strict=True)):
        assert answer.status == other.status == "OK", (i, answer.error, other.error)
        assert answer.only == other.only, i
        assert answer.raw_logprobs == other.raw_logprobs, i
        assert answer.ends[0].reason == other.ends[0].reason


def test_the_same_request_says_the_same_alone_beside_others_and_after_preemption(cluster) -> None:
    requests = variety(18)
    running = cluster(**ROOMY)
    alone = [ask_one(running.address, request) for request in requests]
    same(ask_all(running.address, requests), alone)
    crowded = ask_all(cluster(**CROWDED).address, requests)
    same(crowded, alone)
    assert sum(answer.ends[0].timing.preemptions for answer in crowded) > 0


def test_a_killed_worker_costs_a_structured_answer_nothing(own_cluster) -> None:
    requests = [request for request in variety(18) if request.structured]
    with own_cluster(workers=2, **ROOMY) as running:
        undisturbed = ask_all(running.address, requests)
        pid = running.pid("worker-0")
        same(asyncio.run(kill_in_mid_stream(running, "worker-0", requests, after=120)), undisturbed)
        running.wait_restarted("worker-0", pid)
        wait_for(lambda: len(running.load().groups) == 2, 30, "both workers are registered again")
        same(ask_all(running.address, requests), undisturbed)
        running.assert_idle()


def test_waiting_for_a_grammar_is_told_as_such(own_cluster) -> None:
    with own_cluster(**ROOMY) as running:
        asked = following(("json_object", ""), max_tokens=2, include_timing=True)
        first, second = ask_one(running.address, asked), ask_one(running.address, asked)
        waited = [answer.ends[0].timing.queue_reason_ns.get("grammar", 0) for answer in (first, second)]
        assert waited[0] > waited[1] > 0, "the second finds it compiled"


def test_what_only_the_worker_can_tell_is_refused_too(cluster) -> None:
    """A vocabulary has the special tokens that a grammar may name, or not."""
    answer = ask_one(cluster(**ROOMY).address, following(("grammar", "start: <|nowhere|>")))
    assert answer.status == "INVALID_ARGUMENT" and answer.error.field == "structured.grammar"
    assert "nowhere" in answer.error.message
