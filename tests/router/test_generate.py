"""The router's ordinary path, through the real gRPC door, in front of a fake scheduler."""

import asyncio

import pytest

from services.router import wire
from services.router.request import Delta
from shared.net.options import SPLIT_BYTES
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from shared.text.chat import ChatTemplate
from tests.builders.fake_scheduler import FakeScheduler, pack, unpack
from tests.builders.router import ends, ids, run, running_router, texts
from tests.builders.tiny_text import CHAT_TEMPLATE, write_tiny_model


def ask(prompt="the quick fox", **fields):
    fields.setdefault("stopping", pb.Stopping(max_tokens=8))
    return pb.GenerateRequest(prompt=prompt, **fields)


def saying(tokenizer, text):
    """An `answer` that says `text` and ends with EOS."""
    token_ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return lambda request, index: token_ids


def test_a_prompt_is_answered_with_accepted_deltas_and_one_finished(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            responses = await router.generate(ask())
            prompt = tokenizer.encode("the quick fox")
            assert responses[0].accepted.prompt_tokens == len(prompt)
            assert responses[0].accepted.request_id.startswith("req-")
            assert len(ids(responses)) == 8
            assert texts(responses)[0] == tokenizer.decode([*prompt, *ids(responses)])[len("the quick fox") :]
            (finished,) = ends(responses)
            assert finished.reason == pb.FINISH_REASON_LENGTH
            assert finished.usage == pb.Usage(prompt_tokens=len(prompt), completion_tokens=8, cached_tokens=3)
            assert not finished.HasField("timing")
            assert scheduler.requests[0].token_ids == prompt
            await router.idle()

    run(test())


def test_the_phases_of_a_request_sum_to_its_total(tiny_model):
    async def test():
        scheduler = FakeScheduler(step_s=0.01)
        async with running_router(tiny_model, scheduler) as router:
            request = ask(response=pb.ResponseOptions(include_timing=True))
            timing = ends(await router.generate(request))[0].timing
            parts = timing.admit_ns + timing.tokenize_ns + timing.route_ns + timing.schedule_ns + timing.deliver_ns
            assert parts == timing.total_ns
            inner = timing.link_ns + timing.queue_ns + timing.prefill_ns + timing.decode_ns
            assert inner == timing.schedule_ns
            assert (timing.queue_ns, timing.prefill_ns, timing.decode_ns) == (10, 20, 30)
            assert 70e6 < timing.schedule_ns <= timing.total_ns
            assert 0 < timing.time_to_first_token_ns < timing.schedule_ns

    run(test())


def test_end_of_sequence_ends_with_stop_and_is_no_part_of_the_text(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=saying(tokenizer, " jumps 你好🙂"))
        async with running_router(tiny_model, scheduler) as router:
            responses = await router.generate(ask())
            assert texts(responses)[0] == " jumps 你好🙂"
            assert ids(responses)[-1] == tokenizer.eos_token_id
            (finished,) = ends(responses)
            assert (finished.reason, finished.stop_match.token_id) == (pb.FINISH_REASON_STOP, 1)

    run(test())


def test_no_delta_carries_half_a_character(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=saying(tokenizer, "世界🙃é" * 4), step_s=0.001)
        async with running_router(tiny_model, scheduler) as router:
            responses = await router.generate(ask())
            deltas = [one.delta.text for one in responses if one.HasField("delta")]
            assert "".join(deltas) == "世界🙃é" * 4
            assert not any("\ufffd" in text for text in deltas)

    run(test())


def test_a_stop_string_across_token_borders_ends_the_sample_and_tells_the_scheduler(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=saying(tokenizer, "one two STOP three four"), step_s=0.005)
        async with running_router(tiny_model, scheduler) as router:
            responses = await router.generate(ask(stopping=pb.Stopping(max_tokens=99, stop=["STOP", "never"])))
            assert texts(responses)[0] == "one two "
            (finished,) = ends(responses)
            assert (finished.reason, finished.stop_match.stop) == (pb.FINISH_REASON_STOP, "STOP")
            said = len(tokenizer.encode("one two STOP", add_special_tokens=False))
            assert finished.usage.completion_tokens == said == len(ids(responses))
            request = scheduler.requests[0]
            assert request.aborts == [(0, scheduling_pb2.ABORT_CAUSE_STOP_STRING)]
            await router.idle()

    run(test())


def test_min_tokens_lets_an_early_stop_string_pass(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=saying(tokenizer, "one STOP two STOP three"))
        early = len(tokenizer.encode("one STOP", add_special_tokens=False))
        async with running_router(tiny_model, scheduler) as router:
            stopping = pb.Stopping(max_tokens=99, min_tokens=early, stop=["STOP"])
            responses = await router.generate(ask(stopping=stopping))
            assert texts(responses)[0] == "one STOP two "

    run(test())


def test_text_held_for_a_stop_string_comes_out_at_the_end(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=saying(tokenizer, "ends with STO"))
        async with running_router(tiny_model, scheduler) as router:
            responses = await router.generate(ask(stopping=pb.Stopping(stop=["STOP"])))
            assert texts(responses)[0] == "ends with STO"

    run(test())


def test_samples_end_once_each_and_usage_comes_with_the_last(tiny_model, tokenizer):
    async def test():
        says = ["one", "two STOP never", "three and more"]
        answers = [[*tokenizer.encode(text, add_special_tokens=False), 1] for text in says]
        scheduler = FakeScheduler(answer=lambda request, index: answers[index], step_s=0.002)
        async with running_router(tiny_model, scheduler) as router:
            request = ask(sampling=pb.Sampling(n=3), stopping=pb.Stopping(stop=["STOP"]))
            responses = await router.generate(request)
            assert texts(responses) == {0: "one", 1: "two ", 2: "three and more"}
            finished = ends(responses)
            assert sorted(one.index for one in finished) == [0, 1, 2]
            assert [one.HasField("usage") for one in finished] == [False, False, True]
            counted = sum(len(ids(responses, index)) for index in range(3))
            assert finished[-1].usage.completion_tokens == counted
            assert scheduler.requests[0].submit.n == 3

    run(test())


def test_a_chat_is_rendered_and_not_given_a_second_bos(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="the fox")])
            await router.generate(pb.GenerateRequest(chat=chat))
            named = {"bos_token": "<s>", "eos_token": "</s>"}
            text = ChatTemplate({"default": CHAT_TEMPLATE}, named).render([{"role": "user", "content": "the fox"}])
            assert scheduler.requests[0].token_ids == tokenizer.encode(text, add_special_tokens=False)
            assert scheduler.requests[0].token_ids.count(0) == 1

    run(test())


def test_every_field_reaches_the_scheduler_resolved(tiny_model):
    async def test():
        scheduler = FakeScheduler()
        async with running_router(tiny_model, scheduler) as router:
            sampling = pb.Sampling(
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
            stopping = pb.Stopping(max_tokens=5, min_tokens=2, stop_token_ids=[9, 9, 8])
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5, 6, 7]),
                sampling=sampling,
                stopping=stopping,
                priority=-3,
                deterministic=True,
                response=pb.ResponseOptions(logprobs=2),
            )
            responses = await router.generate(request, timeout=9)
            assert responses[0].accepted.seed == 2**64 - 1
            submit = scheduler.requests[0].submit
            row = scheduling_pb2.RowSampling(
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
            assert submit.sampling == row
            assert (submit.max_tokens, submit.min_tokens, submit.priority) == (5, 2, -3)
            assert unpack(submit.stop_token_ids) == [1, 8, 9]
            assert (submit.logprobs, submit.prompt_logprobs, submit.deterministic) == (2, -1, True)
            assert 8e9 < submit.deadline_in_ns < 9.1e9
            assert scheduler.requests[0].token_ids == [5, 6, 7]

    run(test())


def test_what_is_unset_falls_back_to_generation_config_then_to_the_default(tmp_path):
    async def test():
        generation = {"temperature": 0.5, "top_k": 20, "top_p": 7.0, "eos_token_id": [1, 2]}
        model = write_tiny_model(tmp_path / "m", generation=generation)
        scheduler = FakeScheduler()
        async with running_router(model, scheduler) as router:
            first = await router.generate(ask())
            await router.generate(
                ask(sampling=pb.Sampling(temperature=0, top_k=0), stopping=pb.Stopping(ignore_eos=True))
            )
            unset, given = (request.submit for request in scheduler.requests)
            row = unset.sampling
            assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.5, 20, 1, 0)
            assert (row.repetition_penalty, row.seed) == (1, first[0].accepted.seed)
            assert unpack(unset.stop_token_ids) == [1, 2]
            assert (given.sampling.temperature, given.sampling.top_k, given.max_tokens) == (0, 0, 0)
            assert unpack(given.stop_token_ids) == []
            assert unset.deadline_in_ns > 0

    run(test())


def test_seeds_are_drawn_anew_for_each_request(tiny_model):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            seeds = {(await router.generate(ask()))[0].accepted.seed for _ in range(4)}
            assert len(seeds) == 4

    run(test())


def test_logprobs_come_with_their_tokens_and_bytes(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            wanted = pb.ResponseOptions(logprobs=2, prompt_logprobs=1)
            call = router.inference.Generate(ask("fox", response=wanted), timeout=5)
            request = await scheduler.request()
            prompt = request.token_ids

            def logprob(value, *top):
                ids_, values = pack([one for one, _ in top]), b"".join(map(_float, (v for _, v in top)))
                return scheduling_pb2.TokenLogprobs(logprob=value, rank=1, top_ids=ids_, top_logprobs=values)

            of_prompt = [logprob(-1, (prompt[1], -1)) for _ in prompt[1:]]
            request.tokens([prompt[1]], logprobs=[logprob(-0.5, (prompt[1], -0.5), (9, -2))], prompt_logprobs=of_prompt)
            request.end()
            request.release()
            responses = [one async for one in call]
            accepted = responses[0].accepted
            assert [one.token_id for one in accepted.prompt_logprobs] == prompt
            assert (accepted.prompt_logprobs[0].rank, accepted.prompt_logprobs[1].logprob) == (0, -1)
            (one,) = responses[1].delta.logprobs
            assert (one.token_id, one.logprob, one.rank) == (prompt[1], -0.5, 1)
            assert [top.token_id for top in one.top] == [prompt[1], 9]
            assert one.top[0].token == tokenizer.texts.token_bytes(prompt[1])

    run(test())


def _float(value):
    import struct

    return struct.pack("<f", value)


def likely(count, *, tops=20):
    """So many tokens' logprobs with the most alternatives that may be asked for."""
    one = scheduling_pb2.TokenLogprobs(
        logprob=-1, rank=1, top_ids=pack(range(300, 300 + tops)), top_logprobs=_float(-1.5) * tops
    )
    return [one] * count


def test_the_logprobs_of_a_long_prompt_reach_a_client_that_takes_4_mib(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None, max_model_len=100_000)
        async with running_router(tiny_model, scheduler) as router:
            prompt = [i % 400 for i in range(16_000)]
            wanted = pb.ResponseOptions(prompt_logprobs=20)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), response=wanted, request_id="long")
            call = router.inference.Generate(request, timeout=20)
            submitted = await scheduler.request()
            submitted.tokens([9], prompt_logprobs=likely(len(prompt) - 1))
            submitted.end()
            submitted.release()
            responses = [one async for one in call]
            parts = [one.accepted for one in responses if one.HasField("accepted")]
            assert [one.HasField("accepted") for one in responses] == [True] * len(parts) + [False] * 2
            assert sum(part.ByteSize() for part in parts) > 4 * 2**20
            assert [one.token_id for part in parts for one in part.prompt_logprobs] == prompt
            assert {(part.request_id, part.prompt_tokens) for part in parts} == {("long", len(prompt))}
            assert (ids(responses), len(ends(responses))) == ([9], 1)

    run(test())


def test_what_merged_unread_reaches_a_client_that_takes_4_mib(tiny_model, tokenizer):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, max_unread_bytes=2**30) as router:
            call = router.inference.Generate(ask(response=pb.ResponseOptions(logprobs=20)), timeout=20)
            request = await scheduler.request()
            said = tokenizer.encode("你好🙂", add_special_tokens=False)
            token_ids = said * 2_500
            request.tokens(token_ids, logprobs=likely(len(token_ids)))
            request.end()
            request.release()
            responses = [one async for one in call]
            deltas = [one.delta for one in responses if one.HasField("delta")]
            assert sum(delta.ByteSize() for delta in deltas) > 4 * 2**20
            assert texts(responses)[0] == "你好🙂" * 2_500
            assert ids(responses) == token_ids
            assert [one.token_id for delta in deltas for one in delta.logprobs] == token_ids
            assert len(ends(responses)) == 1

    run(test())


@pytest.mark.parametrize(
    ("text", "num_tokens", "num_parts"), [("你好🙂", 5, 1), ("🙂" * 1_500_000, 3, 7), ("", 400_000, 4), ("x" * 3, 0, 1)]
)
def test_a_delta_without_logprobs_is_split_where_it_is_too_large(text, num_tokens, num_parts):
    event = Delta(index=2, text=text, token_ids=tuple(range(100_000_000, 100_000_000 + num_tokens)))
    parts = [response.delta for response in wire.responses_of(event)]
    assert len(parts) == num_parts
    assert all(part.ByteSize() < 2 * SPLIT_BYTES and part.index == 2 for part in parts)
    assert "".join(part.text for part in parts) == text
    assert [one for part in parts for one in part.token_ids] == list(event.token_ids)


def test_accepted_goes_out_before_any_token(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            call = router.inference.Generate(ask(request_id="mine"), timeout=5)
            first = await call.read()
            assert first.accepted.request_id == "mine"
            request = await scheduler.request()
            request.end()
            request.release()
            assert (await call.read()).finished.reason == pb.FINISH_REASON_LENGTH

    run(test())


@pytest.mark.parametrize(
    ("body", "header", "expected"), [("", "from-header", "from-header"), ("body", "header", "body")]
)
def test_the_request_id_comes_from_body_or_header_and_goes_back(tiny_model, body, header, expected):
    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            call = router.inference.Generate(ask(request_id=body), metadata=(("x-request-id", header),), timeout=5)
            assert dict(await call.initial_metadata())["x-request-id"] == expected
            assert (await call.read()).accepted.request_id == expected

    run(test())


def test_a_very_long_prompt_travels_in_parts(tiny_model):
    async def test():
        scheduler = FakeScheduler(max_model_len=2_000_000)
        async with running_router(tiny_model, scheduler) as router:
            token_ids = [i % 400 for i in range(600_000)]
            request = pb.GenerateRequest(prompt="x" * 10)
            request.token_ids.ids.extend(token_ids)
            # the checkpoint takes 512 tokens, but what the scheduler says counts
            await router.generate(request)
            assert scheduler.requests[0].token_ids == token_ids

    run(test())


def test_models_are_listed_with_what_the_scheduler_serves(tiny_model):
    async def test():
        names = ("first", "second")
        async with running_router(tiny_model, FakeScheduler(max_model_len=256), served_model_name=names) as router:
            models = (await router.inference.ListModels(pb.ListModelsRequest(), timeout=5)).models
            assert [model.name for model in models] == ["first", "second"]
            assert (models[0].max_model_len, models[0].vocab_size, models[0].dtype) == (256, 400, "float32")
            assert models[0].has_chat_template
            await router.generate(ask(model="second"))

    run(test())


def test_the_account_of_a_complete_answer_is_not_waited_for_for_ever(tiny_model, monkeypatch):
    monkeypatch.setattr("services.router.session.ACK_TIMEOUT_S", 0.05)

    async def test():
        async with running_router(tiny_model, FakeScheduler(ack_delay_s=2)) as router:
            (finished,) = ends(await router.generate(ask()))
            assert (finished.reason, finished.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 8)

    run(test())


def test_a_crowd_that_arrives_at_once_is_answered_whole(tiny_model):
    """Beyond a thousand calls that Python has not taken in yet gRPC would cancel some, without a word."""

    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            calls = [router.inference.ListModels(pb.ListModelsRequest()) for _ in range(4000)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, BaseException)] == []

    run(test(), timeout_s=60)
