"""kernels.ops.sampling: the fast bodies against the specification, the specification against transformers and
statistics, and every row alone against the same row among others, to the bit."""

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.cpu import sampling as cpu
from kernels.ops import sampling as ops
from kernels.reference import sampling as reference

BODIES = [cpu, reference]
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(rows, vocab, seed=0, spread=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def keys_for(rows, seed=0):
    seeds = torch.arange(rows, dtype=torch.int64) * 7919 + seed
    return ops.noise_keys(seeds, torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 11))


def parameters(rows, **fields):
    values = NEUTRAL | fields
    kinds = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
    return [torch.as_tensor(values[name], dtype=kind).expand(rows).clone() for name, kind in kinds.items()]


# The noise

PINNED_KEYS = [[2604305085, 323439934], [3714418258, 1550260109], [2545522509, 70412564]]
PINNED_BITS = [
    [2994932780, 3935262381, 46450623],
    [3331243251, 3675152092, 724710478],
    [776894578, 3382789126, 85384274],
]


def test_the_noise_is_pinned():
    """A change here would change every seeded answer ever given."""
    keys = ops.noise_keys(torch.tensor([0, -1, 1 << 40]), torch.tensor([0, 1, 2]), torch.tensor([0, 5, 4096]))
    assert keys.tolist() == PINNED_KEYS
    assert ops.noise_bits(keys, torch.tensor([0, 1, 127_999])).tolist() == PINNED_BITS


def test_both_bodies_make_the_same_noise_bit_for_bit():
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    counters = [torch.randint(0, 2**31, (50,), generator=generator) for _ in range(2)]
    keys = cpu.noise_keys(seeds, *counters)
    assert torch.equal(keys, reference.noise_keys(seeds, *counters))
    token_ids = torch.arange(5003)
    assert torch.equal(cpu.noise_bits(keys, token_ids), reference.noise_bits(keys, token_ids))
    assert torch.equal(cpu.gumbel(keys, token_ids), reference.gumbel(keys, token_ids))


def test_the_noise_needs_nothing_but_32_bit_unsigned_arithmetic():
    """What Triton will do: the same in wrapping uint32, one value at a time."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    seed, sample_index, position, token_id = 0x123456789ABCDEF0, 3, 77, 31_999
    keys = []
    for state in (0x243F6A88, 0x85A308D3):
        for word in (seed % 2**32, seed >> 32, sample_index, position):
            state = mix((state + 0x9E3779B9) % 2**32 ^ word)
        keys.append(state)
    x = mix(token_id) ^ keys[0]
    x = ((x ^ (x >> 16)) * 0x7FEB352D + keys[1]) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x ^= x >> 16
    got = ops.noise_keys(torch.tensor([seed]), torch.tensor([sample_index]), torch.tensor([position]))
    assert got.tolist() == [keys]
    assert ops.noise_bits(got, torch.tensor([token_id])).tolist() == [[x]]


COUNTERS = ["seed", "high half of the seed", "sample index", "position", "token id"]


def bits_along(counter, count, base=123):
    """Noise bits while one counter runs and the others rest: int64 [count]."""
    run = torch.arange(count)
    rest = torch.full((count,), base)
    seeds = {"seed": run, "high half of the seed": run << 32}.get(counter, rest)
    samples = run if counter == "sample index" else rest
    positions = run if counter == "position" else rest
    if counter == "token id":
        return ops.noise_bits(ops.noise_keys(rest[:1], rest[:1], rest[:1]), run)[0]
    return ops.noise_bits(ops.noise_keys(seeds, samples, positions), torch.tensor([base]))[:, 0]


def chi_square(values, num_bins):
    """Deviation from uniform in standard deviations, about normal."""
    counts = torch.bincount(values, minlength=num_bins).double()
    expected = len(values) / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (num_bins - 1)) / (2 * (num_bins - 1)) ** 0.5


@pytest.mark.parametrize("counter", COUNTERS)
def test_the_noise_is_uniform_along_every_counter(counter):
    bits = bits_along(counter, 2**18)
    for shift in (0, 8, 16, 24):
        assert abs(chi_square((bits >> shift) & 0xFF, 256)) < 5, f"byte at bit {shift}"


@pytest.mark.parametrize("counter", COUNTERS)
def test_neighbours_along_every_counter_are_independent(counter):
    bits = bits_along(counter, 2**16)
    for lag in (1, 2, 256):
        changed = bits[lag:] ^ bits[:-lag]
        share = torch.stack([((changed >> bit) & 1).double().mean() for bit in range(32)])
        assert (share - 0.5).abs().max() < 5 * 0.5 / len(changed) ** 0.5, f"lag {lag}"
        pairs = ((bits[lag:] >> 28) << 4) | (bits[:-lag] >> 28)
        assert abs(chi_square(pairs, 256)) < 5


def test_the_checks_of_the_noise_reject_a_plain_counter():
    assert abs(chi_square((torch.arange(2**18) * 3) & 0xFF, 256)) > 5


def test_rows_of_noise_do_not_follow_each_other():
    """Rows whose keys differ in one counter by one are uncorrelated over the vocabulary."""
    count = 32
    run, rest = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    for arguments in ((run, rest, rest), (rest, run, rest), (rest, rest, run), (run << 32, rest, rest)):
        noise = ops.noise_bits(ops.noise_keys(*arguments), torch.arange(20_000)).double() / 2**32 - 0.5
        correlation = torch.corrcoef(noise) - torch.eye(count)
        assert correlation.abs().max() < 6 / 20_000**0.5


@pytest.mark.parametrize("body", BODIES)
def test_gumbel_noise_has_its_mean_variance_and_range(body):
    noise = body.gumbel(keys_for(40), torch.arange(25_000)).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.577216) < 0.005
    assert abs(noise.var().item() - 1.644934) < 0.01


@pytest.mark.parametrize("body", BODIES)
def test_sampling_follows_the_softmax(body):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0, 1.5, -0.5, 0.25]])
    count = 200_000 if body is cpu else 20_000
    rest = torch.zeros(count, dtype=torch.int64)
    keys = body.noise_keys(rest, rest, torch.arange(count))
    tokens, _ = body.sample(logits.expand(count, -1).contiguous(), keys, *parameters(count, temperature=0.8))
    expected = (logits[0].double() / 0.8).softmax(-1) * count
    statistic = ((torch.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum().item()
    assert statistic < 30  # chi-square with 7 degrees of freedom: 1 in 10,000


# Bodies against the specification

SHAPES = [(1, 8), (3, 501), (7, 4096), (2, 32_000)]
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "whole": {},
    "hot": {"temperature": 50.0},
    "cold": {"temperature": 1e-3},
    "top_k": {"top_k": 5},
    "top_k beyond": {"top_k": 10**6},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_cpu_samples_what_the_specification_samples(shape, setting):
    rows, vocab = shape
    for seed in range(8 if vocab < 10_000 else 1):
        logits, keys = random_logits(rows, vocab, seed), keys_for(rows, seed)
        if setting == "top_k beyond":
            values = parameters(rows, top_k=0) if vocab < 10 else parameters(rows, top_k=min(10**6, vocab))
        else:
            values = parameters(rows, **SETTINGS[setting])
        got, got_values = cpu.sample(logits, keys, *values)
        expected, expected_values = reference.sample(logits, keys, *values)
        assert torch.equal(got, expected)
        assert torch.equal(got_values, expected_values)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_bounds_find_the_draw_in_every_one_of_many_rows(spread):
    rows, vocab = 6000, 211
    logits, keys = random_logits(rows, vocab, seed=8, spread=spread), keys_for(rows, seed=6)
    expected = (reference.scale(logits, torch.ones(rows)) + reference.gumbel(keys, torch.arange(vocab))).argmax(-1)
    assert torch.equal(ops.sample(logits, keys, *parameters(rows))[0], expected)


def test_a_bound_is_above_its_score_and_near_it_where_it_matters():
    scaled, keys = reference.scale(random_logits(50, 9000), torch.ones(50)), keys_for(50)
    noise = reference.gumbel(keys, torch.arange(9000))
    bounds = torch.from_numpy(cpu._score_bounds(scaled.numpy(), keys.numpy().astype(np.uint32)))
    above = bounds - (scaled + noise)
    assert above.min() > -cpu.BOUND_SLACK / 2
    assert above[noise > 3].max() < 0.12


def test_rows_with_different_settings_share_a_call():
    rows = len(SETTINGS)
    logits, keys = random_logits(rows, 900), keys_for(rows)
    each = [parameters(1, **setting) for setting in SETTINGS.values()]
    together, _ = ops.sample(logits, keys, *(torch.cat(column) for column in zip(*each, strict=True)))
    alone = [ops.sample(logits[i : i + 1], keys[i : i + 1], *each[i])[0] for i in range(rows)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_forbidden_ids_are_never_sampled_and_a_lone_id_always():
    logits = random_logits(64, 300)
    logits[:, 1:] = -torch.inf
    for values in (parameters(64), parameters(64, top_k=3), parameters(64, top_p=0.5)):
        assert ops.sample(logits, keys_for(64), *values)[0].eq(0).all()


@pytest.mark.parametrize("body", BODIES)
def test_the_lowest_id_wins_among_equals(body):
    logits = torch.zeros(3, 1000)
    logits[0, [17, 900]] = 1.0
    logits[1, 999] = 1.0
    tokens, values = body.best(logits)
    assert tokens.tolist() == [17, 999, 0]
    assert values.tolist() == [1.0, 1.0, 0.0]
    assert body.sample(logits, keys_for(3), *parameters(3, temperature=0.0))[0].tolist() == [17, 999, 0]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("setting", ["greedy", "whole", "all"])
def test_a_broken_row_shows_in_its_value_and_spares_its_neighbours(body, bad, setting):
    logits, keys = random_logits(3, 700), keys_for(3)
    values = parameters(3, **SETTINGS[setting])
    healthy, _ = body.sample(logits, keys, *values)
    broken = logits.clone()
    broken[1] = bad if bad == -torch.inf else broken[1].index_fill(0, torch.tensor([650]), bad)
    tokens, highest = body.sample(broken, keys, *values)
    assert torch.isfinite(highest).tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == healthy[[0, 2]].tolist()


def test_only_broken_rows_raise_nothing():
    logits = torch.full((2, 50), torch.nan)
    assert not torch.isfinite(ops.sample(logits, keys_for(2), *parameters(2))[1]).any()


# Filters against transformers


def kept_by_transformers(scaled, warpers):
    scores = scaled.clone()
    for warper in warpers:
        scores = warper(None, scores)
    return torch.isfinite(scores)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"top_k": 30, "top_p": 0.8, "min_p": 0.05},
            [TopKLogitsWarper(30), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
        ),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_what_is_kept_is_what_transformers_keeps(body, fields, warpers):
    logits = random_logits(40, 1200, seed=5)
    scaled = reference.scale(logits, torch.ones(40))
    kept = body.keep(scaled, *parameters(40, **fields)[1:])
    assert torch.equal(kept, kept_by_transformers(scaled, warpers))
    assert not torch.equal(kept.roll(1, 0), kept)


def test_a_prefiltered_nucleus_is_the_whole_vocabularys_nucleus():
    for spread in (0.0, 0.01, 1.0, 10.0):
        scaled = reference.scale(random_logits(6, 3000, spread=spread), torch.ones(6))
        for top_p in (0.01, 0.5, 0.95, 0.999):
            values = parameters(6, top_p=top_p)[1:]
            assert torch.equal(cpu.keep(scaled, *values), reference.keep(scaled, *values))


def test_top_k_keeps_ties_and_top_p_takes_the_lowest_ids_first():
    scaled = torch.tensor([[0.0, -1.0, -1.0, -1.0, -5.0]])
    for body in BODIES:
        assert body.keep(scaled, *parameters(1, top_k=2)[1:]).tolist() == [[True, True, True, True, False]]
        assert body.keep(torch.zeros(1, 4), *parameters(1, top_p=0.5)[1:]).tolist() == [[True, True, False, False]]


# Changing logits


def entries(per_row):
    rows = torch.tensor([row for row, ids in per_row for _ in ids])
    return rows, torch.tensor([token_id for _, ids in per_row for token_id in ids])


@pytest.mark.parametrize("body", BODIES)
def test_repetition_penalty_is_that_of_transformers(body):
    logits = random_logits(2, 50)
    history = torch.tensor([[3, 4, 4, 9], [0, 49, 3, 3]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())
    rows, ids = entries([(0, [3, 4, 9]), (1, [0, 49, 3])])
    got = logits.clone()
    body.penalize(got, rows, ids, torch.zeros(6), torch.full((6,), 1.7), torch.zeros(6), torch.zeros(6))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert not torch.equal(got, logits)


@pytest.mark.parametrize("body", BODIES)
def test_presence_and_frequency_penalties_count_the_output_only(body):
    logits = torch.ones(1, 6)
    rows, ids = entries([(0, [1, 2, 5])])
    counts = torch.tensor([0.0, 1.0, 3.0])
    body.penalize(logits, rows, ids, counts, torch.ones(3), torch.full((3,), 0.5), torch.full((3,), 0.25))
    assert logits.tolist() == [[1.0, 1.0, 0.25, 1.0, 1.0, -0.25]]


@pytest.mark.parametrize("body", BODIES)
def test_bias_is_added_and_forbidden_ids_are_minus_infinity(body):
    logits = torch.zeros(2, 4)
    body.add_bias(logits, *entries([(0, [1]), (1, [0, 3])]), torch.tensor([1.5, -2.0, 3.0]))
    body.forbid(logits, *entries([(1, [2])]))
    assert logits.tolist() == [[0.0, 1.5, 0.0, 0.0], [-2.0, 0.0, -torch.inf, 3.0]]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
def test_only_tokens_whose_bit_is_set_are_left(body, vocab):
    logits = random_logits(3, vocab)
    words = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), generator=torch.Generator().manual_seed(5))
    body.restrict(changed := logits.clone(), torch.tensor([2, 0]), words.int())
    assert torch.equal(changed[1], logits[1])
    for row, line in ((2, words[0].tolist()), (0, words[1].tolist())):
        for token in range(vocab):
            allowed = line[token // 32] >> (token % 32) & 1
            assert changed[row, token] == (logits[row, token] if allowed else -torch.inf)


def test_both_bodies_penalize_to_the_same_bits():
    logits = random_logits(5, 400)
    rows, ids = entries([(row, list(range(row, 400, 7))) for row in range(5)])
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 4, (len(ids),), generator=generator).float()
    factors = [torch.rand(len(ids), generator=generator) + 0.5 for _ in range(3)]
    results = []
    for body in BODIES:
        results.append(logits.clone())
        body.penalize(results[-1], rows, ids, counts, *factors)
    assert torch.equal(*results)


# Logprobs


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logprobs_ranks_and_the_best_alternatives(body, shape):
    rows, vocab = shape
    logits = random_logits(rows, vocab, seed=3)
    tokens = torch.arange(rows) * 3 % vocab
    expected = logits.double().log_softmax(-1)
    logprobs, ranks, top_ids, top_logprobs = body.token_logprobs(logits, tokens, 5)
    order = logits.argsort(-1, descending=True)
    torch.testing.assert_close(logprobs.double(), expected[torch.arange(rows), tokens], rtol=2e-6, atol=2e-6)
    assert ranks.tolist() == [order[row].tolist().index(tokens[row]) + 1 for row in range(rows)]
    assert torch.equal(top_ids, order[:, :5])
    torch.testing.assert_close(top_logprobs.double(), expected.gather(-1, top_ids), rtol=2e-6, atol=2e-6)
    assert body.token_logprobs(logits, tokens, 0)[2].shape == (rows, 0)


@pytest.mark.parametrize("body", BODIES)
def test_equal_logits_rank_equally_and_list_the_lowest_id_first(body):
    _, ranks, top_ids, _ = body.token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]), torch.tensor([4]), 4)
    assert ranks.tolist() == [1]
    assert top_ids.tolist() == [[1, 2, 4, 0]]


# Independence of the batch


def run_all(logits, keys):
    """Everything that a row can ask for, as tensors with one entry per row."""
    rows = len(logits)
    results = [ops.sample(logits, keys, *parameters(rows, **setting))[0] for setting in SETTINGS.values()]
    results += ops.token_logprobs(logits, results[1], 4)
    penalized = logits.clone()
    where, ids = entries([(row, [3, 5]) for row in range(rows)])
    factors = (torch.full((2 * rows,), factor) for factor in (1.2, 0.3, 0.1))
    ops.penalize(penalized, where, ids, torch.tensor([2.0, 0.0]).repeat(rows), *factors)
    return [*results, penalized]


@pytest.mark.parametrize(("vocab", "rows"), [(501, 64), (4096, 64), (32_000, 5)])
def test_a_row_gives_the_same_bits_alone_and_at_every_place_of_64(vocab, rows):
    logits, keys = random_logits(rows, vocab, seed=9), keys_for(rows, seed=4)
    together, turned = run_all(logits, keys), run_all(logits.flip(0), keys.flip(0))
    alone = [run_all(logits[row : row + 1], keys[row : row + 1]) for row in range(rows)]
    for got, reverse, single in zip(together, turned, zip(*alone, strict=True), strict=True):
        assert torch.equal(got, torch.cat(single))
        assert torch.equal(got.flip(0), reverse)


@pytest.mark.parametrize("function", [np.log, np.log1p, np.exp], ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", [np.float64, np.float32], ids=lambda kind: kind.__name__)
def test_a_logarithm_has_the_same_bits_at_every_offset_and_length(function, kind):
    """kernels.cpu relies on it: vectorised bodies and scalar tails must agree."""
    values = np.random.default_rng(0).uniform(1e-6, 0.999, 67).astype(kind)
    whole = function(values)
    for start in range(33):
        for length in range(1, 34):
            assert np.array_equal(function(values[start : start + length]), whole[start : start + length])
