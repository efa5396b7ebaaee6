"""A seeded workload replays to identical plans: a refactor that changes one is not a refactor."""

import json
import random
from pathlib import Path

import pytest

from services.scheduler.core.scheduler import CoreConfig
from tests.builders.core_driver import CoreDriver, replay, submission

GOLDEN = Path(__file__).parent / "golden"
WORKLOADS = {
    "mixed": {"max_num_seqs": 6, "max_num_batched_tokens": 24},
    "chunked": {"max_num_seqs": 4, "max_num_batched_tokens": 16, "long_prefill_token_threshold": 6},
    "priority": {"max_num_seqs": 3, "max_num_batched_tokens": 32, "policy": "priority"},
}


def play(name: str) -> list[object]:
    """Forty requests of shared and own prompts over a pool that is too small for them, two plans in flight."""
    rng = random.Random(name)
    driver = CoreDriver(CoreConfig(max_model_len=96, **WORKLOADS[name]), max_in_flight=2)
    driver.add_group("g0", num_blocks=24, block_size=4)
    for number in range(40):
        shared = [rng.randrange(3)] * rng.randrange(0, 20)
        own = [rng.randrange(50) for _ in range(rng.randrange(1, 12))]
        driver.submit(
            submission(number, shared + own, max_tokens=rng.randrange(1, 16), seed=number, priority=rng.randrange(3))
        )
        for _ in range(rng.randrange(4)):
            driver.now_ns += 1_000_000
            driver.schedule()
            driver.deliver()
        if rng.random() < 0.1:
            driver.abort(rng.randrange(number + 1))
    driver.run()
    driver.assert_answers()
    return json.loads(json.dumps(replay(driver.plans)))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seeded_workload_replays_to_identical_plans(name: str):
    """Regenerate on purpose with `python -m tests.scheduler.core.test_replay`."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert play(name) == golden


def test_two_runs_of_one_seed_are_equal_and_two_seeds_are_not():
    assert play("mixed") == play("mixed")
    assert play("mixed") != play("chunked")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for workload in WORKLOADS:
        (GOLDEN / f"{workload}.json").write_text(json.dumps(play(workload), separators=(",", ":")) + "\n")
