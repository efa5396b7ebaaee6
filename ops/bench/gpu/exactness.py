"""The requests of the case `exactness`, and how an answer is compared with that of the same request alone."""

import random
from collections.abc import Sequence

import msgspec

from ops.bench.gpu.clients import Stream, draw_ids
from ops.bench.workload import Job

SAMPLED = {"temperature": 0.8, "top_k": 40}
NUM_LOGPROBS = 2
WAVES, TOY_WAVES = {3: 90, 16: 200, 64: 260, 256: 350}, {2: 4, 3: 5, 8: 7, 16: 8}
"""Requests at once → how many of the exact ones: few where few run together, which is slow."""
DISTURBING = 5
"""One ordinary request to so many exact ones."""


def references(vocab_size: int, *, toy: bool) -> list[Job]:
    """Distinct exact requests: three in ten share a prefix, two in five are sampled by a seed."""
    return [_job(f"exactness {n}", n, vocab_size, toy, exact=True) for n in range(6 if toy else 100)]


def wave(at_once: int, count: int, jobs: Sequence[Job], vocab_size: int, *, toy: bool) -> list[tuple[int, Job]]:
    """`count` repeats of `jobs` among ordinary requests, shuffled: the number of its reference (-1: none) and each.
    Every other repeat has a salt of its own, so that it finds nothing cached and computes its prompt in what chunks its
    neighbours leave it."""
    rng = random.Random(f"wave {at_once}")
    numbers = rng.choices(range(len(jobs)), k=count)
    seeds = [f"disturbing {at_once} {n}" for n in range(count // DISTURBING)]
    ordinary = [(-1, _job(seed, n, vocab_size, toy, exact=False)) for n, seed in enumerate(seeds)]
    repeats = [(n, jobs[n] if i % 2 else _salted(jobs[n], f"{at_once} {i}")) for i, n in enumerate(numbers)]
    mixed = [*repeats, *ordinary]
    rng.shuffle(mixed)
    return mixed


def _salted(job: Job, salt: str) -> Job:
    return msgspec.structs.replace(job, fields={**job.fields, "cache_salt": salt})


def difference(found: Stream, reference: Stream) -> str:
    """Where two answers differ first, tokens and logprobs with the alternatives; nothing where they are identical."""
    if len(found.token_ids) != len(reference.token_ids):
        return f"{len(found.token_ids)} tokens instead of {len(reference.token_ids)}"
    for n, (token_id, expected) in enumerate(zip(found.token_ids, reference.token_ids, strict=True)):
        if token_id != expected:
            return f"token {n} is {token_id} instead of {expected}"
        if found.logprobs[n : n + 1] != reference.logprobs[n : n + 1]:
            return f"logprobs of token {n} are {found.logprobs[n : n + 1]} instead of {reference.logprobs[n : n + 1]}"
    return ""


def _job(seed: str, number: int, vocab_size: int, toy: bool, *, exact: bool) -> Job:
    rng = random.Random(seed)
    longest, shared = (60, 32) if toy else (1500, 512)
    prefix = draw_ids("exactness prefix", shared, vocab_size) if number % 10 < 3 else ()
    own = rng.randint(20, longest - len(prefix))
    outputs = rng.randint(12, 24)
    fields = {**SAMPLED, "seed": number} if number % 5 in (1, 3) else {}
    token_ids = prefix + draw_ids(seed, own, vocab_size)
    return Job(token_ids, outputs, exact, {**fields, "logprobs": NUM_LOGPROBS} if exact else fields, keeps=exact)
