"""Tiny random twins through the whole cluster, against transformers in float32: logprobs and 64 greedy tokens."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from services.cli.client import Request
from tests.builders.answers import ask_all
from tests.counts import count
from tests.models.twins import TWINS, make_twin

pytestmark = pytest.mark.cluster

FIRST = ("llama", "gemma2", "bloom", "qwen2-moe")
"""Between them rope, ALiBi, windows, soft caps, experts and biases; the full tier takes every twin."""
NAMES = (*FIRST, *(name for name in TWINS if name not in FIRST))[: count("cluster_twins")]
LENGTHS = (1, 7, 31, 90)
NEW_TOKENS = 64
WITHIN = {"llama-dynamic": 48, "llama-longrope": 128, "phi3-longrope": 128}
"""Beyond so many tokens transformers scales all positions by the longest, as no cache can (ops/decisions): there
tests/models compares token by token."""


@cache
def model_of(folder: Path) -> torch.nn.Module:
    attention = TWINS[folder.name].attention
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def new_tokens(name: str) -> int:
    """64, or as many as leave a prompt of 16 tokens."""
    return min(NEW_TOKENS, WITHIN[name] - 16) if name in WITHIN else NEW_TOKENS


def prompts_for(vocab_size: int, name: str) -> list[list[int]]:
    rng = random.Random(name)
    longest = WITHIN[name] - new_tokens(name) if name in WITHIN else max(LENGTHS)
    return [[rng.randrange(2, vocab_size) for _ in range(min(length, longest))] for length in LENGTHS]


@torch.inference_mode()
def expected(folder: Path, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers, and the log-probabilities of every position of prompt and answer."""
    model = model_of(folder)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    # No end-of-sequence: its absence is what ignore_eos asks of us.
    model.generation_config.eos_token_id = None
    whole = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
    )
    return whole[0, len(prompt) :].tolist(), model(whole).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_answers_as_transformers_does(name: str, own_cluster, tmp_path: Path) -> None:
    folder = make_twin(name, tmp_path)
    prompts = prompts_for(int(model_of(folder).config.vocab_size), name)
    requests = [
        Request(
            token_ids=tuple(prompt),
            temperature=0,
            max_tokens=new_tokens(name),
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=0,
            repetition_penalty=1.0,
        )
        for prompt in prompts
    ]
    with own_cluster(model=str(folder), dtype="float32", max_num_batched_tokens=64, max_num_seqs=4) as cluster:
        answers = ask_all(cluster.address, requests)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status == "OK", answer.error
        tokens, logprobs = expected(folder, prompt, new_tokens(name))
        assert answer.only == tokens
        for i, entry in enumerate(answer.logprobs[0]):
            row = logprobs[len(prompt) - 1 + i]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-3)
            assert entry.rank == 1
            best = row.topk(3).values.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(best, abs=2e-3)
        assert answer.accepted is not None
        told = answer.accepted.prompt_logprobs
        assert len(told) == len(prompt)
        for i in range(1, len(prompt)):
            assert told[i].token_id == prompt[i]
            assert told[i].logprob == pytest.approx(float(logprobs[i - 1, prompt[i]]), abs=2e-3)


CLOSE = 0.02
"""Of the logprobs' norm: what bfloat16's eight bits cost in three layers. One wrong page or row is far beyond it."""


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
def test_bfloat16_by_default_says_nearly_what_transformers_does_in_float32(alone: bool, own_cluster, tmp_path: Path):
    """The fast path that nobody asked to be exact: products of few rows, decode rows in place, prompts in pieces."""
    folder = make_twin("llama", tmp_path)
    prompts = prompts_for(int(model_of(folder).config.vocab_size), "bfloat16") * (1 if alone else 4)
    requests = [
        Request(token_ids=tuple(prompt), temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
        for prompt in prompts
    ]
    with own_cluster(model=str(folder), dtype="bfloat16", max_num_batched_tokens=64, max_num_seqs=16) as cluster:
        batches = [[request] for request in requests] if alone else [requests]
        answers = [answer for batch in batches for answer in ask_all(cluster.address, batch)]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.only) == NEW_TOKENS, answer.error
        whole = torch.tensor([prompt + answer.only])
        with torch.inference_mode():
            logprobs = model_of(folder)(whole).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(1, whole[0, len(prompt) :, None])[:, 0]
        told = torch.tensor([entry.logprob for entry in answer.logprobs[0]])
        assert float((told - expected).norm() / expected.norm()) < CLOSE
