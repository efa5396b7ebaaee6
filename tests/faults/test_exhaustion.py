"""Four times more work than the KV pool holds: everything completes, and every token equals a roomy run's."""

import random

import pytest

from services.cli.client import Request
from tests.builders.answers import ask_all

pytestmark = pytest.mark.cluster

BLOCK = 16
POOL_BLOCKS = 24


def test_four_times_oversubscribed_everything_completes_with_the_same_tokens(cluster, twin: dict) -> None:
    rng = random.Random(4)
    requests = [
        Request(
            token_ids=tuple(rng.randrange(2, 384) for _ in range(rng.randrange(8, 40))),
            temperature=float(i % 2),
            seed=i,
            max_tokens=64,
            ignore_eos=True,
            include_timing=True,
        )
        for i in range(20)
    ]
    wanted_blocks = sum(-(-(len(r.token_ids) + 63) // BLOCK) for r in requests)
    assert wanted_blocks >= 4 * POOL_BLOCKS
    roomy = ask_all(cluster(**twin).address, requests)
    tight = ask_all(cluster(**twin, num_gpu_blocks_override=POOL_BLOCKS).address, requests)
    assert [answer.status for answer in tight] == ["OK"] * len(requests)
    assert [answer.only for answer in tight] == [answer.only for answer in roomy]
    assert sum(answer.ends[0].timing.preemptions for answer in tight) > 0
