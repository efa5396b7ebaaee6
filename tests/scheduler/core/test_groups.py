"""Cache groups: how layers are grouped, what a window lets go of, and what a prefix hit needs."""

import random

import pytest

from services.scheduler.core.invariants import violations
from services.scheduler.core.scheduler import CoreConfig
from shared.cache_groups import (
    PADDING,
    UNBOUNDED,
    first_block,
    group_layers,
    held_blocks,
    longest_context,
    most_blocks,
)
from tests.builders.core_driver import CoreDriver, submission

BLOCK = 4
GEMMA_3 = [(26, 4, 7), (34, 5, 7), (48, 8, 6), (62, 11, 6)]
"""Layers of the 1B, 4B, 12B and 27B (every sixth sees all positions), size and number of their groups."""


def driver(windows: tuple[int | None, ...], *, num_blocks: int = 400, in_flight: int = 2, **config: int) -> CoreDriver:
    made = CoreDriver(CoreConfig(**{"max_model_len": 40_000, **config}), max_in_flight=in_flight)
    made.add_group("g0", num_blocks=num_blocks, block_size=BLOCK, windows=windows)
    return made


def held(one: CoreDriver, key: object) -> list[int]:
    """Blocks of the request's first sample, by cache group."""
    return [len(table.blocks) for table in one.core.requests[key].samples[0].tables]


def test_layers_of_one_window_are_one_group():
    for window in (None, 4096):
        groups = group_layers([window] * 32)
        assert (groups.windows, groups.layers) == ((window,), 32)
        assert groups.places == tuple((0, layer) for layer in range(32))


def test_alternating_layers_are_two_groups_the_one_without_a_window_first():
    groups = group_layers([8, None] * 3)
    assert (groups.windows, groups.layers) == ((None, 8), 3)
    assert groups.places == ((1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2))


@pytest.mark.parametrize(("num_layers", "layers", "num_groups"), GEMMA_3)
def test_five_windows_to_one_make_few_groups_of_little_padding(num_layers: int, layers: int, num_groups: int):
    groups = group_layers([None if layer % 6 == 5 else 512 for layer in range(num_layers)])
    assert (groups.layers, len(groups.windows)) == (layers, num_groups)


def test_any_pattern_gives_each_layer_a_place_of_its_own_and_bounds_the_padding():
    rng = random.Random(0)
    for _ in range(300):
        windows = [rng.choice([None, 8, 128]) for _ in range(rng.randint(1, 40))]
        groups = group_layers(windows)
        assert len(set(groups.places)) == len(windows)
        assert all(groups.windows[group] == window for (group, _), window in zip(groups.places, windows, strict=True))
        assert all(layer < groups.layers for _, layer in groups.places)
        for window in set(windows):
            padding = groups.windows.count(window) * groups.layers - windows.count(window)
            assert padding * PADDING <= windows.count(window)


def test_a_sequence_holds_its_window_and_a_chunk_wherever_they_begin():
    for window, chunk in ((1, 1), (3, 5), (8, 1), (8, 8), (9, 16)):
        most = max(
            -(-(start + chunk) // BLOCK) - first_block(window, start, BLOCK) for start in range(100, 100 + BLOCK)
        )
        assert most == most_blocks(window, BLOCK, chunk)


def test_the_longest_context_is_the_longest_that_the_pool_holds():
    for windows in ((None,), (6,), (None, 6), (None, None, 9), (5, 17)):
        for num_blocks in range(1, 40):
            longest = longest_context(num_blocks, windows, BLOCK, 4)
            assert held_blocks(longest, windows, BLOCK, 4) <= num_blocks
            assert longest == UNBOUNDED or held_blocks(longest + 1, windows, BLOCK, 4) > num_blocks


def test_a_request_of_32k_tokens_in_windows_holds_a_constant_number_of_blocks():
    """A window of 64 tokens touches 17 blocks of 4; the prompt's chunks of 32 take 8 more."""
    d = driver((64,), num_blocks=40, max_num_batched_tokens=32)
    d.check = False
    d.submit(submission("long", (i % 40 for i in range(32_000)), max_tokens=768))
    prompt_blocks, answer_blocks = set(), set()
    while d.core.requests:
        while d.schedule():
            pass
        tokens = d.core.requests["long"].samples[0].planned
        (prompt_blocks if tokens < 32_000 else answer_blocks).update(held(d, "long"))
        if d.steps % 97 == 0:
            assert violations(d.core) == []
        d.deliver()
    assert prompt_blocks == {25}
    assert max(answer_blocks) <= 25 and sorted(answer_blocks)[:2] == [16, 17]
    assert len(d.answer("long")) == 768
    d.assert_answers()
    d.assert_idle()


def test_without_a_window_a_group_keeps_every_block():
    d = driver((None, 16), max_num_batched_tokens=16)
    d.submit(submission("a", range(200), max_tokens=100))
    for _ in range(90):
        d.schedule()
        d.deliver()
    sample = d.core.requests["a"].samples[0]
    assert held(d, "a")[0] == -(-sample.planned // BLOCK) and held(d, "a")[1] in (4, 5)


def test_a_request_too_long_for_the_pool_runs_in_windows():
    refused, taken = driver((None,), num_blocks=20), driver((16,), num_blocks=20, max_num_batched_tokens=32)
    for d in (refused, taken):
        d.submit(submission("a", range(300), max_tokens=50))
        d.run()
    assert refused.released["a"].refusal.name == "exceeds_kv_pool"
    assert taken.answer("a") == taken.expected("a")


def test_more_requests_run_at_once_in_windows():
    """A prompt of 190 tokens is 48 blocks; in a window of 16 it holds 21 with a chunk of 64, and 5 while it answers."""
    running = {}
    for windows in ((None,), (16,)):
        d = driver(windows, num_blocks=260, max_num_batched_tokens=64)
        for key in range(40):
            d.submit(submission(key, range(key, key + 190), max_tokens=100))
        most = 0
        while d.core.requests:
            d.schedule()
            most = max(most, len(d.core.groups["g0"].running))
            d.deliver()
        running[windows] = most
        d.assert_answers()
    assert (running[(None,)], running[(16,)]) == (5, 27)


def test_a_hit_in_windows_needs_only_the_blocks_of_the_last_one():
    d = driver((None, 10), in_flight=1)
    d.submit(submission("a", range(100), max_tokens=1))
    d.run()
    index, pool = d.core.groups["g0"].pool.index, d.core.groups["g0"].pool
    in_window = sorted(index.by_hash[1].values(), key=lambda entry: entry.token_ids[0])
    assert len(index.by_hash[0]) == len(in_window) == 25
    for entry in in_window[:21]:  # what was let go of first
        index.remove(entry.block)
        del pool.cached[entry.block]
        pool.free.append(entry.block)
    d.submit(submission("b", range(100), max_tokens=1))
    admission = d.schedule().admissions[0]
    assert admission.computed == 96
    assert [(first, len(blocks)) for first, blocks in admission.tables] == [(0, 25), (21, 4)]
    d.run()
    assert d.answer("b") == d.expected("b")


def test_a_hit_is_as_long_as_every_group_can_serve():
    d = driver((None, 10), in_flight=1)
    d.submit(submission("a", range(100), max_tokens=1))
    d.run()
    index, pool = d.core.groups["g0"].pool.index, d.core.groups["g0"].pool
    gone = next(entry for entry in index.by_hash[1].values() if entry.token_ids[0] == 80)
    index.remove(gone.block)
    del pool.cached[gone.block]
    pool.free.append(gone.block)
    for key, length, computed in (("b", 97, 96), ("c", 94, 80), ("d", 70, 68)):
        d.submit(submission(key, range(length), max_tokens=1))
        assert d.schedule().admissions[0].computed == computed
        d.run()
        assert d.answer(key) == d.expected(key)


def test_groups_do_not_find_each_others_blocks():
    d = driver((6, 6), in_flight=1)
    d.submit(submission("a", range(50), max_tokens=1))
    d.run()
    index = d.core.groups["g0"].pool.index
    for place in range(10):
        block_hash = list(index.by_hash[0])[place]
        assert index.by_hash[0][block_hash].block != index.by_hash[1][block_hash].block


def test_a_conversation_goes_on_from_its_last_window():
    d = driver((12,), num_blocks=60, max_num_batched_tokens=16)
    d.submit(submission("a", range(50), max_tokens=30))
    d.run()
    told = [*range(50), *d.answer("a")]
    d.submit(submission("b", [*told, 1, 2, 3], max_tokens=5))
    d.run()
    assert d.released["b"].cached_tokens == 76
    assert d.answer("b") == d.expected("b")


@pytest.mark.parametrize("windows", [(12,), (None, 12), (None, 5, 12)])
def test_a_hit_answers_as_a_miss_does(windows: tuple[int | None, ...]):
    answers = []
    for caching in (True, False):
        d = driver(windows, num_blocks=90, max_num_batched_tokens=24, enable_prefix_caching=caching)
        for key in range(12):
            d.submit(submission(key, [*range(40), *range(key % 3)], max_tokens=20, seed=key % 2))
        d.run()
        d.assert_answers()
        d.assert_idle()
        answers.append([d.answer(key) for key in range(12)])
        assert (d.core.counts.prefix_hits > 0) == caching
    assert answers[0] == answers[1]


def test_preempted_and_failed_requests_begin_again_in_windows():
    d = driver((None, 9), num_blocks=30, max_num_batched_tokens=16)
    for key in range(6):
        d.submit(submission(key, range(key * 5, key * 5 + 20), max_tokens=25))
    for turn in range(40):
        d.schedule()
        d.deliver(error="made to fail" if turn == 20 else "")
    d.run()
    d.assert_answers()
    assert sum(d.core.counts.preemptions.values()) > 1
    d.assert_idle()
