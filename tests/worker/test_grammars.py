"""Masks against a reference that tries every token; guided rows beside plain ones; grammars as a scheduler sends
them."""

import asyncio
import itertools
import json
import random
import threading

import grpc
import numpy as np
import pytest
import torch

from services.worker.grammars import MAX_KEPT, GrammarCompiler
from services.worker.models.decoder import load_decoder
from services.worker.sampling.guide import Guide, Masks
from shared.checkpoint import open_checkpoint
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from shared.sampling import Sampling
from shared.structured import Structured
from shared.text.grammar import UNSATISFIABLE, GrammarError, compile_grammar
from tests.builders.grammars import TWIN_LOGITS, matcher, token_bytes, vocabulary
from tests.builders.plans import make_admit, make_plan, plan_message
from tests.builders.runners import LateCopies, answer_all, answer_alone, make_asked, make_runner
from tests.models.twins import make_twin
from tests.worker.test_runner import plain, prompt_of
from tests.worker.test_servicer import end_of, prompt_plan, read, scenario, tokens_of, worker

EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yé", 1, None]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
OPTIONS = ["the fox", "the", "thé 🙂", "dog\n", r"a|b (c)*[d]{2}\.^$ #&~-<>\"'/"]
SPACES = list(itertools.product(("", " "), repeat=3))
LANGUAGES = {
    "choice": (json.dumps(OPTIONS), OPTIONS),
    "regex": (
        "(ab|the|1){1,3} fox?",
        [
            "".join(p) + end
            for k in (1, 2, 3)
            for p in itertools.product(("ab", "the", "1"), repeat=k)
            for end in (" fo", " fox")
        ],
    ),
    "grammar": (
        'start: WORD (", " WORD)?\nWORD: "the" | "quick"',
        ["the", "quick", *(f"{a}, {b}" for a in ("the", "quick") for b in ("the", "quick"))],
    ),
    "json_schema": (
        json.dumps(SCHEMA),
        [f'{{"a":{s}{a}}}' for a in ('"x"', '"yé"', "1", "null") for s in ("", " ")]
        + [
            f'{{"a":{s}{a},{t}"b":{u}{b}}}'
            for a in ('"x"', '"yé"', "1", "null")
            for b in ("true", "false")
            for s, t, u in SPACES
        ],
    ),
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = make_twin("llama", tmp_path_factory.mktemp("twins"))
    return load_decoder(open_checkpoint(str(path)), torch.float32)


def tried(words: list[bytes], said: bytes, tokens: tuple[bytes, ...]) -> set[int]:
    """The tokens after which `said` is still the beginning of a word, or is one (EOS)."""
    open_ends = {word[len(said) : len(said) + k] for word in words if word.startswith(said) for k in range(1, 40)}
    open_ends.discard(b"")
    return {i for i, token in enumerate(tokens) if token in open_ends} | ({EOS} if said in words else set())


@pytest.mark.parametrize("tokenizer", ["byte_level", "llama2", "gemma"])
@pytest.mark.parametrize("kind", LANGUAGES)
@pytest.mark.parametrize("num_logits", [512, 547])
def test_masks_are_those_of_trying_every_token(kind, tokenizer, num_logits):
    """Of tokens that say the same one is allowed, and where the next byte is certain only the tokens that the tokenizer
    would take; elsewhere all."""
    text, language = LANGUAGES[kind]
    words, tokens = [word.encode() for word in language], token_bytes(tokenizer)
    grammar = matcher(kind, text, tokenizer, num_logits)
    rng, num_free, masks = random.Random(f"{kind} {tokenizer}"), 0, Masks(num_logits)
    for _ in range(12):
        guide, said = Guide(grammar, np.empty(0, np.int32)), b""
        while True:
            [mask] = masks.allowed([guide])
            assert len(mask) == -(-num_logits // 32)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            allowed = set(np.flatnonzero(bits).tolist())
            expected = tried(words, said, tokens)
            assert allowed <= expected
            assert (EOS in allowed) == (said in words)
            if len({tokens[i][:1] for i in expected}) > 1:
                assert {tokens[i] for i in allowed} == {tokens[i] for i in expected}
                num_free += 1
            assert allowed
            token = rng.choice(sorted(allowed))
            if token == EOS:
                break
            said += tokens[token]
            guide.accept(token)
        assert said in words and not guide.error
    assert num_free > 12


@pytest.mark.parametrize("num_threads", [1, 3])
def test_guides_taken_up_again_allow_what_the_first_did_and_those_moved_together_what_they_do_alone(num_threads):
    """One after another drops out of the group."""
    texts = ["[a-z ]{5,40}", "[0-9]{9}", "(the|quick| ){4,30}", "a[a-z]{0,20}"]
    grammars = [matcher("regex", text) for text in texts]
    rng, masks, alone = random.Random(1), Masks(TWIN_LOGITS, num_threads), Masks(TWIN_LOGITS)
    guides = [Guide(grammar, np.empty(0, np.int32)) for grammar in grammars]
    generated, running = [[] for _ in texts], list(range(len(texts)))
    while running:
        allowed = masks.allowed([guides[i] for i in running])
        again = [Guide(grammars[i], np.array(generated[i], np.int32)) for i in running]
        assert np.array_equal(allowed, np.concatenate([alone.allowed([guide]) for guide in again]))
        bits = np.unpackbits(allowed.view(np.uint8), axis=1, bitorder="little")
        for i, row in zip(running, bits, strict=True):
            generated[i].append(rng.choice(np.flatnonzero(row).tolist()))
            guides[i].accept(generated[i][-1])
        running = [i for i in running if generated[i][-1] != EOS]
    assert len({len(each) for each in generated}) > 1


# Beside other rows.

DIGITS = "[0-9 ]{200}"


def guided(rng):
    """Rows with grammars that do not end, in every kind of company."""
    kinds = [
        {"grammar": matcher("regex", DIGITS), "sampling": Sampling(seed=4), "logprobs": 2},
        {"grammar": matcher("regex", DIGITS), "sampling": Sampling(seed=4), "sample_index": 1},
        {"grammar": matcher("regex", "[a-z]{3}( [a-z]{3}){60}"), "logprobs": 0},
        {
            "grammar": matcher("regex", DIGITS),
            "sampling": Sampling(
                seed=5, top_k=5, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((7, 9.0),)
            ),
        },
        {"sampling": Sampling(seed=6), "logprobs": 1},
        {},
    ]
    return [make_asked(prompt_of(rng), rng.randint(4, 14), **kind) for kind in kinds]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ahead", "copies"), [(0, False), (0, True), (1, True)])
def test_guided_rows_say_the_same_alone_and_in_any_plan(decoder, seed, ahead, copies):
    alone = guided(random.Random(seed))
    runner = make_runner(decoder)
    for asked in alone:
        answer_alone(runner, asked)
    fields = {"copies": LateCopies()} if copies else {}
    rng = random.Random(seed)
    together = answer_all(make_runner(decoder, **fields), guided(random.Random(seed)), rng, ahead=ahead)
    assert [plain(each) for each in together] == [plain(each) for each in alone]
    tokens = token_bytes("byte_level")
    for asked in together[:2]:
        assert b"".join(tokens[i] for i in asked.tokens).strip(b"0123456789 ") == b""


def test_logprobs_of_a_guided_row_are_those_of_the_model(decoder):
    (plain_row,) = answer_all(make_runner(decoder), [make_asked([5, 6, 7], 1, logprobs=3)], random.Random(0))
    asked = make_asked([5, 6, 7], 1, logprobs=3, grammar=matcher("regex", DIGITS))
    answer_all(make_runner(decoder), [asked], random.Random(0))
    assert asked.logprobs[0].top_ids.tolist() == plain_row.logprobs[0].top_ids.tolist()
    assert asked.logprobs[0].top_logprobs.tolist() == plain_row.logprobs[0].top_logprobs.tolist()
    assert asked.logprobs[0].logprob < plain_row.logprobs[0].logprob


def test_a_grammar_that_gives_up_is_told_with_its_row_and_the_step_goes_on(decoder):
    broken = matcher("regex", DIGITS).deep_copy()
    broken.consume_token(100)
    assert broken.is_error()
    runner = make_runner(decoder)
    admits = [
        make_admit(0, [5, 6]),
        make_admit(1, [7, 8], grammar=broken),
        make_admit(2, [9, 8], grammar=matcher("regex", DIGITS)),
    ]
    output = runner.run(make_plan(1, [(slot, 2, True, (slot,)) for slot in range(3)], admits))
    ((row, told),) = output.grammar_errors
    assert row == 1 and told and "non-verbose" not in told
    assert len(output.tokens) == 3
    assert runner.run(make_plan(2, [(0, 1, True, ()), (2, 1, True, ())])).grammar_errors == ()


# Among what is no part of the structure.

THOUGHT, OPENED = {"reasoning_close": "</think>"}, {"reasoning_open": "<think>", "reasoning_close": "</think>"}
CALL = {"call_open": "[TOOL]", "call_close": "[/TOOL]"}
SPECIAL = {"reasoning_close": "<|endoftext|>", "call_open": "<s>", "call_close": "<unk>"}
AMONG = [
    (
        THOUGHT,
        ["hm {</thi\n</think>\n\n{}", "</think>{}"],
        ["{}", "</think>\n\n\n{}", "</think>hm", "</think>{}</think>"],
    ),
    (OPENED, ["<think>hm</think>{}", "{}"], ["hm</think>{}", "<think>{}", "\n{}"]),
    (CALL, ["{}", "[TOOL]a[/TOOL]", "[TOOL]a[/TOOL]\n[TOOL]b[/TOOL]"], ["[TOOL]a[/TOOL]{}", "{}[TOOL]a[/TOOL]", "a"]),
    (OPENED | CALL, ["<think>hm</think>\n[TOOL]a[/TOOL]", "[TOOL][/TOOL]", "{}"], ["[TOOL]<think>", "a</think>{}"]),
    (SPECIAL, ["hm<|endoftext|>\n{}", "hm<|endoftext|><s>a<unk>"], ["{}", "hm<s>", "hm<|endoftext|>hm"]),
]


@pytest.mark.parametrize(("marks", "whole", "wrong"), AMONG)
@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("json_object", "", "{}"),
        ("regex", "x{3}", "xxx"),
        ("choice", '["the fox","dog"]', "dog"),
        ("grammar", "start: A B\nA: /x+/\nB: /y/", "xxy"),
        ("grammar", 'root ::= "yes" | "no"', "no"),
    ],
)
def test_a_structure_follows_reasoning_and_gives_way_to_calls(marks, whole, wrong, kind, text, fits):
    grammar = compile_grammar(Structured(kind, text, **marks), vocabulary())

    def is_answer(said: str) -> bool:
        matcher = grammar.deep_copy()
        token_ids = vocabulary().tokenize_str(said.replace("{}", fits), parse_special=True)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    assert [said for said in whole if not is_answer(said)] == []
    assert [said for said in wrong if is_answer(said)] == []


# Compiled for whoever asks.


def compile_all(compiler, *structured):
    async def run():
        return [await compiler.compile(each) for each in structured]

    try:
        return asyncio.run(run())
    finally:
        compiler.close()


def test_a_grammar_is_compiled_once_and_few_are_kept():
    threads = set()

    def load():
        threads.add(threading.current_thread().name)
        return vocabulary()

    many = [Structured("regex", f"a{{{number}}}") for number in range(1, MAX_KEPT + 2)]
    found = compile_all(GrammarCompiler(load), many[0], many[0], *many[1:], many[-1], many[0])
    assert found[0] is found[1] and found[-2] is found[-3]
    assert found[-1] is not found[0], "it was the oldest of too many"
    assert len(threads) == 1 and "grammar" in threads.pop()


def test_a_long_chain_of_references_compiles():
    known = {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(4000)} | {"4000": {"const": 5}}
    text = json.dumps({"$ref": "#/$defs/0", "$defs": known}, separators=(",", ":"))
    [matcher] = compile_all(GrammarCompiler(vocabulary), Structured("json_schema", text))
    assert matcher.deep_copy().consume_tokens(vocabulary().tokenize_str("5"))


def test_what_does_not_compile_and_what_has_no_vocabulary_is_told_to_the_client():
    with pytest.raises(GrammarError, match="unclosed group"):
        compile_all(GrammarCompiler(vocabulary), Structured("regex", "("))
    with pytest.raises(GrammarError, match="serve no structured output"):
        compile_all(GrammarCompiler(None), Structured("regex", "a"))

    def load():
        raise OSError("no tokenizer.json")

    with pytest.raises(GrammarError, match="no tokenizer"):
        compile_all(GrammarCompiler(load), Structured("regex", "a"))


@pytest.mark.parametrize(
    ("kind", "text"),
    [("regex", r"[^\s\S]"), ("json_schema", '{"$ref": "#"}'), ("grammar", "start: start")],
)
def test_what_nothing_can_satisfy_is_said_in_words(kind, text):
    with pytest.raises(GrammarError, match=r"^nothing can satisfy it: no token"):
        compile_all(GrammarCompiler(vocabulary), Structured(kind, text))


def test_what_comes_to_nothing_in_an_answer_is_said_in_words_too():
    dead_end = matcher("grammar", 'start: "a" /[^\\s\\S]/')
    masks, guide = Masks(TWIN_LOGITS), Guide(dead_end, np.array([], dtype=np.uint32))
    masks.allowed([guide])
    assert not guide.error
    guide.accept(token_bytes("byte_level").index(b"a"))
    assert (masks.allowed([guide]) == -1).all()
    assert guide.error == UNSATISFIABLE


# As a scheduler sends them.


def prepare(grammar_id, text="[a-z]+", kind="regex"):
    grammar = scheduling_pb2.Grammar(kind=kind, text=text)
    return pb.ExecuteRequest(prepare=pb.Prepare(id=grammar_id, grammar=grammar))


def naming(plan, grammar_id):
    message = plan_message(plan)
    message.plan.admits[0].grammar = grammar_id
    return message


def guided_worker():
    return worker(compiler=GrammarCompiler(vocabulary))


@scenario
async def test_a_prepared_grammar_reaches_the_runner_and_a_forgotten_one_the_plans_before_it():
    async with guided_worker() as w:
        call = await w.ready(1)
        await call.write(prepare(7))
        reply = await read(call)
        assert (reply.prepared.id, reply.prepared.error) == (7, "")
        w.runner.gate.clear()
        await call.write(naming(prompt_plan(1), 7))
        await call.write(pb.ExecuteRequest(forget=pb.Forget(id=7)))
        w.runner.gate.set()
        assert len(tokens_of(await read(call))) == 1
        await call.write(naming(prompt_plan(2), 7))
        assert w.runner._admits[0].grammar is not None
        status, details = await end_of(call)
        assert status is grpc.StatusCode.INVALID_ARGUMENT and "grammar 7" in details


@scenario
async def test_a_grammar_that_does_not_compile_is_answered_and_the_stream_goes_on():
    async with guided_worker() as w:
        call = await w.ready(1)
        await call.write(prepare(1, "a("))
        assert "unclosed group" in (await read(call)).prepared.error
        await call.write(plan_message(prompt_plan(1)))
        assert len(tokens_of(await read(call))) == 1


@scenario
async def test_a_new_stream_begins_without_grammars():
    async with guided_worker() as w:
        call = await w.ready(1)
        await call.write(prepare(1))
        await read(call)
        again = await w.ready(2)
        await again.write(naming(prompt_plan(1), 1))
        assert (await end_of(again))[0] is grpc.StatusCode.INVALID_ARGUMENT


@scenario
async def test_steps_go_on_while_a_grammar_is_compiled():
    gate = threading.Event()

    def load():
        assert gate.wait(5)
        return vocabulary()

    async with worker(compiler=GrammarCompiler(load)) as w:
        call = await w.ready(1)
        await call.write(prepare(1))
        await call.write(plan_message(prompt_plan(1)))
        assert (await read(call)).WhichOneof("message") == "result"
        gate.set()
        assert (await read(call)).prepared.id == 1
