"""The three workloads of the figures, made from a seed: prompts are fresh in every repeat."""

import random
from typing import Any

import msgspec

VOCAB = 32_000
FIRST_ID = 10
"""Lower ids are left to special tokens."""


class Job(msgspec.Struct, frozen=True):
    """One request: greedy, end-of-sequence ignored, exactly `max_tokens` out.

    `fields`: more of the client's Request, by name, over these. `keeps`: its tokens and logprobs are wanted, not only
    their moments. `leave_after`: the client cancels it after so many tokens; 0: never.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    deterministic: bool = False
    fields: dict[str, Any] = {}
    keeps: bool = False
    leave_after: int = 0


def stream(seed: int) -> list[Job]:
    """(a) One stream, 128 in, 128 out."""
    rng = random.Random(f"a{seed}")
    return [Job(_ids(rng, 128), 128)]


def ragged(seed: int) -> list[Job]:
    """(b) 16 at once, prompts of 64–512, outputs of 32–128: 4,085 tokens in and 1,129 out in every repeat."""
    shape = random.Random("lengths")
    prompts = _lengths(shape, 16, 64, 512, 4085)
    outputs = _lengths(shape, 16, 32, 128, 1129)
    rng = random.Random(f"b{seed}")
    return [Job(_ids(rng, prompt), output) for prompt, output in zip(prompts, outputs, strict=True)]


def shared(seed: int) -> list[Job]:
    """(c) 16 at once that share 512 tokens, 32 of their own, 32 out."""
    rng = random.Random(f"c{seed}")
    prefix = _ids(rng, 512)
    return [Job((*prefix, *_ids(rng, 32)), 32) for _ in range(16)]


WORKLOADS = {"a": stream, "b": ragged, "c": shared}


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_ID, VOCAB) for _ in range(count))


def _lengths(rng: random.Random, count: int, low: int, high: int, total: int) -> list[int]:
    """`count` lengths in [low, high] that sum to `total`."""
    lengths = [rng.randint(low, high) for _ in range(count)]
    while (missing := total - sum(lengths)) != 0:
        i = rng.randrange(count)
        lengths[i] = min(high, max(low, lengths[i] + max(-16, min(16, missing))))
    return lengths


def long_tailed(vocab_size: int, *, count: int = 32, toy: bool = False) -> list[Job]:
    """Prompts of 64–512, outputs mostly short and a few of them long: 32 and more, up to 512."""
    rng = random.Random("tail")
    low, high, shortest, mean, longest = (4, 16, 2, 3, 12) if toy else (64, 512, 32, 96, 512)
    jobs = []
    for _ in range(4 if toy else count):
        prompt, output = rng.randint(low, high), min(longest, shortest + int(rng.expovariate(1 / mean)))
        jobs.append(Job(tuple(rng.choices(range(FIRST_ID, vocab_size), k=prompt)), output))
    return jobs


def equal_lengths(vocab_size: int, count: int, prompt: int, output: int, *, seed: int = 0) -> list[Job]:
    """`count` jobs of one length in and one out."""
    rng = random.Random(f"equal {count} {seed}")
    return [Job(tuple(rng.choices(range(FIRST_ID, vocab_size), k=prompt)), output) for _ in range(count)]
