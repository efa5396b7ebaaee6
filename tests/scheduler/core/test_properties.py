"""Random lives: arrivals, aborts, preemptions, failed steps, lost workers. The invariants hold after every step, and
every answer is what its request alone would have been answered."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.scheduler.core.scheduler import CoreConfig
from shared.outcome import AbortCause
from shared.sampling import Want
from shared.structured import Structured
from tests.builders.core_driver import CoreDriver, submission
from tests.counts import count

STEPS_PER_EXAMPLE = 130
"""What an example makes at least on average (measured: 148 to 203); turns the count of steps into one of examples."""

CONFIGS = st.builds(
    CoreConfig,
    max_model_len=st.just(96),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    max_num_batched_tokens=st.sampled_from([8, 16, 64]),
    long_prefill_token_threshold=st.sampled_from([0, 4]),
    max_num_queued_reqs=st.sampled_from([4, 100]),
    policy=st.sampled_from(["fcfs", "priority"]),
    enable_prefix_caching=st.booleans(),
)
WINDOWS = st.sampled_from([(None,), (9,), (None, 9), (5, 5), (None, None, 6), (None, 13, 13), (1, 16)])
OPERATIONS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2**16 - 1)), min_size=150, max_size=300)

total = {"steps": 0}


def prompt(number: int) -> list[int]:
    """A few families of shared prefixes, with own endings of different lengths."""
    family, length = number % 3, 1 + number % 41
    return [family * 10 + i % 7 for i in range(length)] + ([number % 50] if number % 2 else [])


def operate(driver: CoreDriver, kind: int, number: int) -> None:
    groups = list(driver.devices)
    group = groups[number % len(groups)] if groups else "none"
    keys = list(driver.core.requests)
    if kind == 0:
        return
    if kind < 22:
        driver.submit(
            submission(
                len(driver.submissions),
                prompt(number),
                max_tokens=number % 23,
                min_tokens=number % 4 if number % 23 > 4 else 0,
                stop=[number % 50] if number % 3 else [],
                n=1 + (number % 7 == 0) * 2,
                priority=number % 3 - 1,
                deterministic=number % 11 == 0,
                want=Want(prompt_logprobs=0 if number % 6 == 1 else -1),
                seed=number % 5,
                structured=Structured("regex", str(number % 5)) if number % 4 == 1 else None,
                salt=b"tenant" if number % 5 == 0 else b"",
                deadline_ns=driver.now_ns + number * 1000 if number % 13 == 0 else 0,
            )
        )
    elif kind < 27 and keys:
        index = number % 3 - 1
        driver.abort(keys[number % len(keys)], index, list(AbortCause)[number % len(AbortCause)])
    elif kind < 29:
        driver.deliver(group, error="made to fail")
    elif kind == 29 and len(groups) > (number % 4 > 0):
        driver.lose_group(group)
    elif kind == 30 and len(groups) < 3:
        driver.add_group(
            f"g{len(driver.devices)}-{driver.now_ns}",
            num_blocks=4 + number % 40,
            max_num_seqs=1 + number % 9,
            windows=driver.core.groups[groups[0]].spec.windows if groups and number % 2 else (None,),
        )
    elif kind < 35:
        driver.prepare(group, error="no such grammar" if number % 8 == 0 else "")
    elif kind < 66:
        driver.schedule(group)
    else:
        driver.deliver(group)
    driver.now_ns += 1 + number * 50


@settings(
    max_examples=max(1, count("core_steps") // STEPS_PER_EXAMPLE),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    config=CONFIGS,
    operations=OPERATIONS,
    num_blocks=st.integers(6, 40),
    in_flight=st.integers(1, 2),
    windows=WINDOWS,
)
def check_random_lives(
    config: CoreConfig, operations: list, num_blocks: int, in_flight: int, windows: tuple[int | None, ...]
) -> None:
    driver = CoreDriver(config, max_in_flight=in_flight)
    driver.add_group("g0", num_blocks=num_blocks * len(windows), windows=windows)
    for kind, number in operations:
        operate(driver, kind, number)
    if not driver.devices:
        driver.add_group("last", num_blocks=num_blocks)
    driver.run()
    driver.assert_answers()
    driver.assert_idle()
    total["steps"] += driver.steps


def test_invariants_hold_and_answers_agree_through_random_lives():
    total["steps"] = 0
    check_random_lives()
    print(f"core steps: {total['steps']}")
    assert total["steps"] >= count("core_steps")
