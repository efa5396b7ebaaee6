"""/v1/completions: what reaches the scheduler, and what the client reads."""

import asyncio
import struct

import pytest

from shared.rpc.sluice.v1 import scheduling_pb2
from tests.builders.fake_scheduler import FakeScheduler, pack, unpack
from tests.builders.http import answer_next, asking, events, texts
from tests.builders.router import run, running_router
from tests.builders.tiny_text import write_tiny_model

PATH = "/v1/completions"


def logprob(value, *top, rank=1):
    values = b"".join(struct.pack("<f", one) for _, one in top)
    return scheduling_pb2.TokenLogprobs(
        logprob=value, rank=rank, top_ids=pack([one for one, _ in top]), top_logprobs=values
    )


def test_a_completion_has_text_end_and_usage(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            said = await client.post(PATH, json={"prompt": "the quick fox", "max_tokens": 4, "user": "me"})
            told = said.json()
        assert said.status_code == 200
        assert said.headers["content-type"] == "application/json"
        assert (told["object"], told["model"]) == ("text_completion", "tiny")
        assert told["id"] == f"cmpl-{said.headers['x-request-id']}"
        assert told["choices"] == [
            {"index": 0, "text": "the quick fox", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ]
        assert told["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 3},
        }

    run(test())


def test_fields_that_are_not_known_are_ignored_and_named(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 4}
            plain = await client.post(PATH, json=ask)
            assert "x-ignored-fields" not in plain.headers
            unknown: dict[str, object] = {"temprature": 0, "user": "me", "a\r\nb: c": 1, "é": 2, "": 3, "x" * 65: 4}
            for stream in (False, True):
                said = await client.post(PATH, json=unknown | ask | {"stream": stream})
                assert said.status_code == 200
                assert said.headers["x-ignored-fields"] == "temprature, user"
            refused = await client.post(PATH, json=ask | {"max_token": 4, "n": 99})
            assert (refused.status_code, refused.headers["x-ignored-fields"]) == (400, "max_token")
            many = await client.post(PATH, json=ask | {f"field{at}": at for at in range(99)})
            assert many.headers["x-ignored-fields"] == ", ".join(f"field{at}" for at in range(32))
            chat = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 4, "prompt": "x"}
            said = await client.post("/v1/chat/completions", json=chat)
            assert (said.status_code, said.headers["x-ignored-fields"]) == (200, "prompt")

    run(test())


def test_a_stream_tells_the_same_in_chunks(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 4, "stream": True}
            plain = await client.post(PATH, json=ask)
            ask["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            counted = events((await client.post(PATH, json=ask)).text)
            ask["stream_options"] = {"include_usage": True}
            *chunks, last = events((await client.post(PATH, json=ask)).text)
        assert plain.headers["content-type"].startswith("text/event-stream")
        told = events(plain.text)
        assert texts(told) == {0: "the quick fox"}
        assert len({(one["id"], one["object"], one["created"], one["model"]) for one in told}) == 1
        assert [one["choices"][0]["finish_reason"] for one in told] == [None] * (len(told) - 1) + ["length"]
        assert not any("usage" in one for one in told)
        assert [one["usage"]["completion_tokens"] for one in counted][-2:] == [4, 4]
        assert counted[0]["usage"]["prompt_tokens"] == 4
        assert {one["usage"] for one in chunks} == {None}
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 8
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}

    run(test())


def test_every_field_reaches_the_scheduler(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {
                "prompt": [5, 6, 7],
                "model": "tiny",
                "temperature": 0.5,
                "top_p": 0.25,
                "top_k": 7,
                "min_p": 0.125,
                "seed": -1,
                "repetition_penalty": 1.5,
                "presence_penalty": -2,
                "frequency_penalty": 2,
                "logit_bias": {"3": -100, "4": 100},
                "max_tokens": 5,
                "min_tokens": 2,
                "stop_token_ids": [8, 9],
                "priority": -3,
                "logprobs": 2,
                "deterministic": True,
                "a_field_of_tomorrow": {"x": 1},
            }
            assert (await client.post(PATH, json=ask)).status_code == 200
            nothing = dict.fromkeys(ask) | {"prompt": [5, 6, 7], "temperature": 0, "top_k": -1, "ignore_eos": True}
            assert (await client.post(PATH, json=nothing)).status_code == 200
        given, unset = (request.submit for request in scheduler.requests)
        assert given.sampling == scheduling_pb2.RowSampling(
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            seed=2**64 - 1,
            repetition_penalty=1.5,
            presence_penalty=-2,
            frequency_penalty=2,
            logit_bias={3: -100, 4: 100},
        )
        assert (given.max_tokens, given.min_tokens, given.priority) == (5, 2, -3)
        assert (given.logprobs, given.prompt_logprobs, given.deterministic) == (2, -1, True)
        assert unpack(given.stop_token_ids) == [1, 8, 9]
        assert scheduler.requests[0].token_ids == [5, 6, 7]
        assert (unset.sampling.temperature, unset.sampling.top_k, unset.max_tokens) == (0, 0, 16)
        assert unpack(unset.stop_token_ids) == []

    run(test())


def test_generation_config_speaks_where_a_request_does_not(tmp_path):
    async def test():
        model = write_tiny_model(tmp_path / "m", generation={"temperature": 0.5, "top_k": 20})
        scheduler = FakeScheduler()
        async with running_router(model, scheduler) as router, asking(router) as client:
            await client.post(PATH, json={"prompt": "fox"})
            await client.post(PATH, json={"prompt": "fox", "temperature": 1, "top_k": 0})
        unset, given = (request.submit.sampling for request in scheduler.requests)
        assert (unset.temperature, unset.top_k) == (0.5, 20)
        assert (given.temperature, given.top_k) == (1, 0)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt", [["the quick fox", "stop words"], [[0, 264, 341, 337], [0, 300]]], ids=["texts", "tokens"]
)
def test_several_prompts_have_n_choices_each_in_order(tiny_model, stream, prompt):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"prompt": prompt, "n": 2, "max_tokens": 3, "stream": stream}
            said = await client.post(PATH, json=ask | ({"stream_options": {"include_usage": True}} if stream else {}))
            await router.idle()
        if stream:
            told = events(said.text)
            found, usage = texts(told), told[-1]["usage"]
        else:
            told = said.json()
            assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
            found, usage = {one["index"]: one["text"] for one in told["choices"]}, told["usage"]
        assert sorted(found) == [0, 1, 2, 3]
        assert (found[0], found[1]) == ("the quick", "the quick fox")  # the second sample begins one token later
        prompts = {request.request_id: request for request in scheduler.requests}
        base = said.headers["x-request-id"]
        assert sorted(prompts) == [f"{base}-0", f"{base}-1"]
        seeds = {request.submit.sampling.seed for request in scheduler.requests}
        assert len(seeds) == 2
        assert usage["prompt_tokens"] == sum(len(request.token_ids) for request in scheduler.requests)
        assert usage["completion_tokens"] == 12

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_echo_comes_before_each_answer(tiny_model, stream):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 3, "n": 2, "echo": True, "stream": stream}
            said = await client.post(PATH, json=ask)
            tokens = await client.post(PATH, json={"prompt": [0, 264, 341, 337], "max_tokens": 4, "echo": True})
        found = texts(events(said.text)) if stream else {one["index"]: one["text"] for one in said.json()["choices"]}
        assert found == {0: "the quick foxthe quick", 1: "the quick foxthe quick fox"}
        assert tokens.json()["choices"][0]["text"] == "<s>the quick foxthe quick fox"

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_tokens_offsets_and_the_best(tiny_model, stream):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"prompt": [0, 264], "max_tokens": 2, "logprobs": 1, "echo": True, "stream": stream}
            call = asyncio.create_task(client.post(PATH, json=ask))
            await answer_next(
                scheduler,
                0,
                [341, 337],
                logprobs=[logprob(-0.5, (341, -0.5)), logprob(float("-inf"), (341, -0.25), rank=9)],
                prompt_logprobs=[logprob(-2, (300, -1), rank=2)],
            )
            said = await call
            assert scheduler.requests[0].submit.logprobs == scheduler.requests[0].submit.prompt_logprobs == 1
        if stream:
            given = [one["choices"][0]["logprobs"] for one in events(said.text)]
            found = {name: [value for one in given if one for value in one[name]] for name in given[0]}
        else:
            found = said.json()["choices"][0]["logprobs"]
        name = "世" if found["top_logprobs"][1].get("世") else next(iter(found["top_logprobs"][1]))
        assert found == {
            "tokens": ["<s>", "the", " quick", " fox"],
            "token_logprobs": [None, -2, -0.5, -9999],
            "text_offset": [0, 3, 6, 12],
            "top_logprobs": [None, {name: -1, "the": -2}, {" quick": -0.5}, {" quick": -0.25, " fox": -9999}],
        }

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"echo": True}, {"skip_special_tokens": False}], ids=["plain", "echo", "all"])
def test_offsets_are_those_of_the_text_that_is_shown(tiny_model, stream, options):
    """Of hidden special tokens nothing is shown, and of a character in several tokens one character."""

    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ids = (await client.post("/tokenize", json={"prompt": "🙃 fox", "add_special_tokens": False})).json()
            answer = [264, 0, *ids["tokens"]]  # the, <s>, three parts of a character, fox
            assert len(answer) == 6
            ask = {"prompt": "the fox", "logprobs": 0, "stream": stream, "return_tokens_as_token_ids": True}
            call = asyncio.create_task(client.post(PATH, json={**ask, **options}))
            request = await scheduler.request(0)
            prompt = unpack(request.submit.token_ids)
            given = {"prompt_logprobs": [logprob(-1) for _ in prompt[1:]]} if "echo" in options else {}
            await answer_next(scheduler, 0, answer, logprobs=[logprob(-1) for _ in answer], **given)
            said = await call
        if stream:
            chunks = events(said.text)
            text = texts(chunks)[0]
            offsets = [
                one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", ())
            ]
        else:
            choice = said.json()["choices"][0]
            text, offsets = choice["text"], choice["logprobs"]["text_offset"]
        if "echo" in options:
            assert offsets[:2] == [0, 0] and offsets[: len(prompt)][-1] < len("the fox")
            assert text[offsets[len(prompt)] :].startswith("the🙃")
            offsets = offsets[len(prompt) :]
        else:
            assert offsets[0] == 0
        the, special, *character, after = offsets
        assert text[the:special] == "the"
        assert text[special : character[0]] == ("<s>" if options.get("skip_special_tokens") is False else "")
        assert len(set(character)) == 1 and text[character[0] : after] == "🙃"

    run(test())


def test_prompt_logprobs_are_by_token_id(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"prompt": [0, 264], "max_tokens": 1, "prompt_logprobs": 1}
            call = asyncio.create_task(client.post(PATH, json=ask))
            await answer_next(scheduler, 0, [341], prompt_logprobs=[logprob(-2, (337, -1), rank=2)])
            told = (await call).json()
        assert told["choices"][0]["prompt_logprobs"] == [
            None,
            {
                "264": {"logprob": -2, "rank": 2, "decoded_token": "the"},
                "337": {"logprob": -1, "rank": 1, "decoded_token": " fox"},
            },
        ]

    run(test())


def test_no_token_is_told_where_only_the_echo_is_wanted(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 0, "echo": True}
            told = (await client.post(PATH, json=ask)).json()
            chunks = events((await client.post(PATH, json=ask | {"stream": True})).text)
        assert told["choices"][0]["text"] == "the quick fox" == texts(chunks)[0]
        assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == ("length", 0)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_or_behind_it(tiny_model, stream):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 30, "stop": " quick", "stream": stream}
            without = await client.post(PATH, json=ask)
            ask |= {"stop": ["zzz", " quick"], "include_stop_str_in_output": True}
            including = await client.post(PATH, json=ask)
        for said, text in ((without, "the"), (including, "the quick")):
            if stream:
                told = events(said.text)
                assert texts(told) == {0: text}
                choice = told[-1]["choices"][0]
            else:
                [choice] = said.json()["choices"]
                assert choice["text"] == text
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " quick")

    run(test())


def test_a_token_that_ends_the_answer_is_named(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 9, "stop_token_ids": [341]}
            [choice] = (await client.post(PATH, json=ask)).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("the", "stop", 341)

    run(test())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("more", "named"), [({}, None), ({"stop_token_ids": [1]}, 1)], ids=["its own", "asked for"])
def test_the_models_own_end_of_sequence_is_no_stop_reason_unless_it_was_asked_for(tiny_model, stream, more, named):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            said = await client.post(PATH, json={"prompt": [5, 1], "max_tokens": 9, "stream": stream} | more)
        [choice] = events(said.text)[-1]["choices"] if stream else said.json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", named)

    run(test())


def test_token_ids_come_where_they_are_wanted(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 4, "return_token_ids": True}
            [choice] = (await client.post(PATH, json=ask)).json()["choices"]
            told = events((await client.post(PATH, json=ask | {"stream": True})).text)
        assert choice["prompt_token_ids"] == choice["token_ids"] == [0, 264, 341, 337]
        assert told[0]["choices"][0]["prompt_token_ids"] == [0, 264, 341, 337]
        assert [i for one in told for i in one["choices"][0].get("token_ids", [])] == [0, 264, 341, 337]

    run(test())


def test_special_tokens_are_skipped_or_spelt(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "max_tokens": 2, "skip_special_tokens": False}
            spelt = (await client.post(PATH, json=ask)).json()
            bare = (await client.post(PATH, json={"prompt": "fox", "add_special_tokens": False})).json()
        assert spelt["choices"][0]["text"] == "<s>the"
        assert bare["usage"]["prompt_tokens"] < 4

    run(test())


def test_timing_comes_in_the_last_chunk_and_in_the_body(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            ask = {"prompt": "the quick fox", "include_timing": True}
            whole = (await client.post(PATH, json=ask)).json()["timing"]
            told = events((await client.post(PATH, json=ask | {"stream": True})).text)
        parts = ("admit_ms", "tokenize_ms", "route_ms", "schedule_ms", "deliver_ms")
        for timing in (whole, told[-1]["timing"]):
            assert sum(timing[part] for part in parts) == pytest.approx(timing["total_ms"], abs=0.01)
            assert timing["total_ms"] > 0 and timing["preemptions"] == 0
        assert not any("timing" in one for one in told[:-1])

    run(test())
