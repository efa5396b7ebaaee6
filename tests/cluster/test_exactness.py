"""Same request, same tokens and the same logprobs, to the bit: alone, in a batch of 64, with a cache hit, after
preemption, at any chunk size, on either worker (float32 on a CPU; bfloat16 where a request asks for it)."""

import random

import pytest

from services.cli.client import Request
from tests.builders.answers import Answer, ask_all, ask_one
from tests.models.twins import make_twin

pytestmark = pytest.mark.cluster

ROOMY = {"dtype": "float32", "max_num_seqs": 64, "max_num_batched_tokens": 2048}
SMALL_CHUNKS = {"dtype": "float32", "max_num_seqs": 12, "max_num_batched_tokens": 13}
"""A prompt is cut at odd places."""
CROWDED = {"dtype": "float32", "max_num_seqs": 16, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 256}
"""Sixteen blocks of 16 tokens for sixteen requests that want about five each: four times oversubscribed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_twin("llama", tmp_path_factory.mktemp("twin")))


def requests_of(count: int, *, length: tuple[int, int] = (3, 60), out: int = 24, seed: int = 1) -> list[Request]:
    """Greedy and sampled ones, plain and penalised; every third shares a prefix."""
    rng = random.Random(seed)
    prefix = [rng.randrange(2, 384) for _ in range(40)]
    requests = []
    for i in range(count):
        own = [rng.randrange(2, 384) for _ in range(rng.randrange(*length))]
        requests.append(
            Request(
                token_ids=tuple([*prefix, *own] if i % 3 == 0 else own),
                temperature=0.0 if i % 4 == 0 else 1.0,
                top_p=0.9 if i % 4 == 1 else 1.0,
                top_k=20 if i % 4 == 2 else 0,
                seed=i,
                repetition_penalty=1.2 if i % 5 == 0 else 1.0,
                presence_penalty=0.5 if i % 5 == 1 else 0.0,
                max_tokens=out,
                ignore_eos=True,
                logprobs=2,
            )
        )
    return requests


def same(answers: list[Answer], reference: list[Answer]) -> None:
    for i, (answer, other) in enumerate(zip(answers, reference, strict=True)):
        assert answer.status == other.status == "OK", (i, answer.error, other.error)
        assert answer.tokens == other.tokens, i
        assert answer.raw_logprobs == other.raw_logprobs, i


def test_alone_in_a_batch_and_with_a_cache_hit(cluster, model: str) -> None:
    running = cluster(model=model, **ROOMY)
    requests = requests_of(64)
    together = ask_all(running.address, requests)
    again = ask_all(running.address, requests)
    same(again, together)
    assert sum(answer.ends[0].usage.cached_tokens for answer in again) > 0
    few = requests[::8]
    alone = [ask_one(running.address, request) for request in few]
    same(alone, together[::8])


@pytest.mark.parametrize("flags", [SMALL_CHUNKS, CROWDED], ids=["small chunks", "preempted"])
def test_at_other_chunk_sizes_and_after_preemption(cluster, model: str, flags: dict) -> None:
    requests = requests_of(16, length=(3, 40), out=40, seed=2)
    reference = ask_all(cluster(model=model, **ROOMY).address, requests)
    timed = [replace_timing(request) for request in requests]
    answers = ask_all(cluster(model=model, **flags).address, timed)
    same(answers, reference)
    if flags is CROWDED:
        assert sum(answer.ends[0].timing.preemptions for answer in answers) > 0


def test_on_either_worker(cluster, model: str) -> None:
    requests = requests_of(24, seed=3)
    reference = ask_all(cluster(model=model, **ROOMY).address, requests)
    running = cluster(model=model, workers=2, **ROOMY)
    same(ask_all(running.address, requests), reference)
    assert all(group.kv_blocks_cached > 0 for group in running.load().groups)


def test_bfloat16_alone_and_in_a_batch_where_asked(cluster, model: str) -> None:
    """A request that asks for `deterministic`; its neighbours in the batch need not."""
    running = cluster(model=model, **{**ROOMY, "dtype": "bfloat16"})
    requests = [Request(**{**as_dict(request), "deterministic": True}) for request in requests_of(16, seed=4)]
    together = ask_all(running.address, requests)
    same([ask_one(running.address, request) for request in requests], together)


def test_seeds_are_echoed_and_bring_the_answer_back(cluster, model: str) -> None:
    running = cluster(model=model, **ROOMY)
    unseeded = Request(token_ids=(5, 6, 7), temperature=1.0, max_tokens=20, ignore_eos=True, n=3)
    first = ask_one(running.address, unseeded)
    assert len({tuple(tokens) for tokens in first.tokens.values()}) == 3
    seeded = Request(**{**as_dict(unseeded), "seed": first.accepted.seed})
    assert ask_one(running.address, seeded).tokens == first.tokens
    assert ask_one(running.address, unseeded).tokens != first.tokens


def as_dict(request: Request) -> dict:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def replace_timing(request: Request) -> Request:
    return Request(**{**as_dict(request), "include_timing": True})
