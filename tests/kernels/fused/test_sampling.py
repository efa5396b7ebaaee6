"""Sampling on the device against its specification: the same ids, the same kept sets and the same noise, bit for bit.

Most tests cut rows into small chunks and small collections, so that vocabularies of a few thousand ids take the way
that 128,000 take on a GPU: several chunks, a sample, a bracket, a collection.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.fused import filters, noise, sampling
from kernels.reference import sampling as spec

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
KINDS = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "whole": {},
    "hot": {"temperature": 50.0},
    "cold": {"temperature": 1e-3},
    "top_k 1": {"top_k": 1},
    "top_k": {"top_k": 20},
    "top_k many": {"top_k": 700, "temperature": 0.7},
    "top_k all": {"top_k": 10**9},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-9},
    "top_p 0": {"top_p": 0.0},
    "top_p near 1": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "many": {"top_k": 900, "top_p": 0.95},
}


def logits_of(rows, vocab, seed=0, spread=3.0, device="cpu"):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(device)


def keys_for(rows, seed=0, device="cpu"):
    zeros = torch.zeros(rows, dtype=torch.int64)
    return spec.noise_keys(torch.arange(rows) * 7919 + seed, zeros, zeros + 11).to(device)


def parameters(rows, device="cpu", **fields):
    values = NEUTRAL | fields
    return [torch.as_tensor(values[name], dtype=kind, device=device).repeat(rows) for name, kind in KINDS.items()]


def mixed(device="cpu"):
    """One row of every setting."""
    each = [parameters(1, device, **setting) for setting in SETTINGS.values()]
    return [torch.cat(column) for column in zip(*each, strict=True)]


@pytest.fixture
def pieces(monkeypatch):
    """Cuts rows as those of a large vocabulary are cut."""
    for name, value in {"CHUNK": 1024, "CAPACITY": 1024, "MIN_SAMPLE": 1024}.items():
        monkeypatch.setattr(filters, name, value)


@pytest.fixture
def wrong_guesses(pieces, monkeypatch):
    """Brackets so narrow that most limits lie outside."""
    monkeypatch.setattr(filters, "DEVIATIONS", 0)


# The noise


def test_noise_is_that_of_the_specification_bit_for_bit(device):
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator).to(device)
    counters = [torch.randint(0, 2**31, (40,), generator=generator).to(device) for _ in range(2)]
    keys = noise.noise_keys(seeds, *counters)
    assert torch.equal(keys, spec.noise_keys(seeds, *counters))
    ids = torch.arange(6007, device=device)
    assert torch.equal(noise.noise_bits(keys, ids), spec.noise_bits(keys, ids))
    ours, theirs = noise.gumbel(keys, ids), spec.gumbel(keys, ids)
    apart = (ours != theirs).nonzero()
    assert len(apart) <= (0 if device == "cpu" else 2), f"{len(apart)} of {ours.numel()}"
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


@triton.jit
def _gumbels_kernel(bits, exact, near, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(bits + at).to(tl.uint32)
    tl.store(exact + at, noise.exact_gumbel(x))
    tl.store(near + at, noise.near_gumbel(x))


def test_the_cheap_noise_is_near_the_exact_one_everywhere(device):
    generator = torch.Generator().manual_seed(2)
    around = [2**power + delta for power in range(33) for delta in range(-3, 4)]
    bits = torch.tensor([b for b in around if 0 <= b < 2**32] + [0xFFFFFFFF - b for b in range(200)])
    bits = torch.cat((bits, torch.randint(0, 2**32, (2**16 - len(bits),), generator=generator))).to(device)
    exact, near = torch.empty(2, len(bits), device=device)
    _gumbels_kernel[(16,)](bits, exact, near, block=2**12)
    assert (exact - near).abs().max() < 2e-5


def test_no_noise(device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert noise.noise_keys(empty, empty, empty).shape == (0, 2)
    assert noise.noise_bits(keys_for(2, device=device), empty).shape == (2, 0)


# Draws


@pytest.mark.parametrize("vocab", [1, 37, 1000, 5003])
def test_samples_are_those_of_the_specification(vocab, pieces, device):
    settings = mixed(device)
    rows = len(settings[0])
    logits, keys = logits_of(rows, vocab, device=device), keys_for(rows, vocab, device)
    got, expected = sampling.sample(logits, keys, *settings), spec.sample(logits, keys, *settings)
    assert got[0].tolist() == expected[0].tolist()
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_many_draws_from_the_whole_vocabulary(spread, device, monkeypatch):
    monkeypatch.setattr(filters, "CHUNK", 256)
    rows, vocab = 200, 211
    logits, keys = logits_of(rows, vocab, spread=spread, device=device), keys_for(rows, device=device)
    temperature = parameters(rows, device)[0]
    got, _ = sampling.sample(logits, keys, temperature, None, None, None)
    assert torch.equal(got, spec.sample(logits, keys, temperature, None, None, None)[0])
    assert len(got.unique()) > 20


def test_leaving_the_filters_out_changes_nothing(device):
    logits, keys = logits_of(4, 3000, device=device), keys_for(4, device=device)
    temperature, *neutral = parameters(4, device)
    temperature[1] = 0
    without = sampling.sample(logits, keys, temperature, None, None, None)
    assert torch.equal(without[0], sampling.sample(logits, keys, temperature, *neutral)[0])


def test_bfloat16_logits_count_as_the_float32_that_they_stand_for(pieces, device):
    settings = mixed(device)
    rows = len(settings[0])
    logits, keys = logits_of(rows, 1601, device=device).bfloat16(), keys_for(rows, device=device)
    got, values = sampling.sample(logits, keys, *settings)
    expected, expected_values = spec.sample(logits.float(), keys, *settings)
    assert got.tolist() == expected.tolist()
    assert torch.equal(values, expected_values)


def test_rows_of_a_wider_tensor(device):
    wide = logits_of(3, 1003, device=device)
    settings, keys = parameters(3, device, top_k=5), keys_for(3, device=device)
    expected = sampling.sample(wide[:, :1000].contiguous(), keys, *settings)[0]
    assert torch.equal(sampling.sample(wide[:, :1000], keys, *settings)[0], expected)


def test_a_row_gives_the_same_bits_alone_and_among_others(pieces, device):
    settings = mixed(device)
    rows = len(settings[0])
    logits, keys = logits_of(rows, 1500, device=device), keys_for(rows, device=device)
    together = sampling.sample(logits, keys, *settings)[0]
    backwards = sampling.sample(logits.flip(0), keys.flip(0), *(each.flip(0) for each in settings))[0]
    assert torch.equal(backwards.flip(0), together)
    for row in range(0, rows, 3):
        one = slice(row, row + 1)
        assert torch.equal(sampling.sample(logits[one], keys[one], *(each[one] for each in settings))[0], together[one])


def test_no_rows(device):
    logits = torch.empty(0, 100, device=device)
    tokens, values = sampling.sample(logits, keys_for(0, device=device), *parameters(0, device))
    assert (tokens.shape, values.shape) == ((0,), (0,))
    assert sampling.best(logits)[0].shape == (0,)
    assert sampling.keep(logits, *parameters(0, device)[1:]).shape == (0, 100)
    found = sampling.token_logprobs(logits, tokens, 3)
    assert [each.shape for each in found] == [(0,), (0,), (0, 3), (0, 3)]


def test_a_lone_id_is_always_drawn(pieces, device):
    settings = [each[::2].contiguous() for each in mixed(device)]
    rows = len(settings[0])
    logits = logits_of(rows, 2048, device=device)
    logits[:, torch.arange(2048, device=device) != 1234] = -torch.inf
    assert sampling.sample(logits, keys_for(rows, device=device), *settings)[0].eq(1234).all()


def test_nothing_is_kept_by_a_min_p_above_one(device):
    logits, settings = logits_of(2, 50, device=device), parameters(2, device, min_p=1.5)
    assert sampling.sample(logits, keys_for(2, device=device), *settings)[0].tolist() == [0, 0]
    assert not sampling.keep(spec.scale(logits, torch.ones(2, device=device)), *settings[1:]).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of inf - inf
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_shows_in_its_value_and_spares_its_neighbours(bad, pieces, device):
    settings = [each[::3].repeat_interleave(2) for each in mixed(device)]
    rows = len(settings[0]) // 2
    logits, keys = logits_of(2 * rows, 1700, device=device), keys_for(2 * rows, device=device)
    healthy, _ = sampling.sample(logits, keys, *settings)
    if bad == -torch.inf:
        logits[1::2] = bad
    else:
        logits[1::2, 1650] = bad
    tokens, values = sampling.sample(logits, keys, *settings)
    assert torch.isfinite(values).tolist() == [True, False] * rows
    assert torch.equal(tokens[::2], healthy[::2])
    for ids in (tokens, sampling.best(logits)[0]):
        assert ((ids >= 0) & (ids < 1700)).all(), "the next step may look them up before anyone has seen the value"
    assert torch.isfinite(sampling.best(logits)[1]).tolist() == [True, False] * rows


def test_the_lowest_id_is_best_among_equals(pieces, device):
    logits = torch.zeros(3, 1600, device=device)
    logits[0, [17, 900]] = 1.0
    logits[1, 1599] = 1.0
    assert sampling.best(logits)[0].tolist() == [17, 1599, 0]
    assert sampling.best(-torch.zeros(1, 700, device=device))[0].tolist() == [0]
    settings = parameters(3, device, temperature=0.0)
    assert sampling.sample(logits, keys_for(3, device=device), *settings)[0].tolist() == [17, 1599, 0]


# Filters


def scaled_rows(vocab, device):
    """Distributions that are hard in different ways, their highest logit 0."""
    generator = torch.Generator().manual_seed(vocab)
    plain = torch.randn(4, vocab, generator=generator) * torch.tensor([[0.01], [1.0], [3.0], [10.0]])
    steps = (torch.randn(2, vocab, generator=generator) * torch.tensor([[1.0], [4.0]])).round()
    coarse = (torch.randn(1, vocab, generator=generator) * 3).bfloat16().float()
    equal = torch.zeros(1, vocab)
    two = torch.zeros(1, vocab)
    two[0, vocab // 3 :] = -2.0
    masked = torch.randn(1, vocab, generator=generator).masked_fill(torch.rand(vocab, generator=generator) < 0.9, -1e9)
    masked = masked.masked_fill(masked < -1e8, -torch.inf)
    masked[0, vocab // 2] = 3.0
    lone = torch.full((1, vocab), -torch.inf)
    lone[0, vocab - 1] = 1.0
    rows = torch.cat((plain, steps, coarse, equal, two, masked, lone)).to(device)
    return rows - rows.amax(-1, keepdim=True)


FILTERS = [setting for name, setting in SETTINGS.items() if name not in ("greedy", "hot", "cold", "whole")]


@pytest.mark.parametrize(
    ("vocab", "cut"),
    [(37, None), (1000, None), (5000, None), (1000, "pieces"), (5000, "pieces"), (3000, "wrong_guesses")],
)
def test_what_is_kept_is_what_the_specification_keeps(vocab, cut, device, request):
    """Each filter on other distributions for each vocabulary."""
    if cut is not None:
        request.getfixturevalue(cut)
    scaled = scaled_rows(vocab, device).repeat(1 if cut == "wrong_guesses" else 2, 1)
    chosen = [FILTERS[(row * 5 + vocab) % len(FILTERS)] for row in range(len(scaled))]
    each = [parameters(1, device, **setting)[1:] for setting in chosen]
    settings = [torch.cat(column) for column in zip(*each, strict=True)]
    got, expected = sampling.keep(scaled, *settings), spec.keep(scaled, *settings)
    assert got.sum(-1).tolist() == expected.sum(-1).tolist()
    assert torch.equal(got, expected)


def test_random_filters_of_many_rows(pieces, device):
    rows, vocab, generator = 16, 1500, torch.Generator().manual_seed(5)
    spread = torch.rand(rows, 1, generator=generator) * 4
    scaled = torch.randn(rows, vocab, generator=generator) * spread
    scaled = (scaled - scaled.amax(-1, keepdim=True)).to(device)
    top_k = torch.randint(0, 2 * vocab, (rows,), generator=generator).to(device)
    top_p, min_p = torch.rand(2, rows, generator=generator).to(device)
    min_p = torch.where(min_p < 0.5, 0, min_p**8)
    assert torch.equal(sampling.keep(scaled, top_k, top_p, min_p), spec.keep(scaled, top_k, top_p, min_p))


@pytest.mark.parametrize("floor", [1e-45, 1e-30, 0.3, 0.9999999, 1.0])
def test_min_p_decides_at_the_last_bit(floor, device):
    """Scaled logits around the edge, one float32 after another, and around 0, where exp rounds to 1."""
    edge = np.float32(np.log(np.float64(np.float32(floor))))
    steps = (edge.view(np.int32) + np.arange(-40, 41, dtype=np.int32)).view(np.float32)
    steps = steps[np.isfinite(steps)]
    steps = np.concatenate(([0.0], -np.abs(steps), -np.logspace(-20, -5, 200, dtype=np.float32))).astype(np.float32)
    scaled = torch.from_numpy(steps)[None].to(device)
    settings = parameters(1, device, min_p=floor)[1:]
    got, expected = sampling.keep(scaled, *settings), spec.keep(scaled, *settings)
    assert 0 < expected.sum() < len(steps)
    told = (steps == 0) | (np.abs(steps) < 4e-17) | (np.abs(steps) > 2e-16)  # between them exponentials differ
    assert torch.equal(got[0, told], expected[0, told])


@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces a function that a compiled kernel has taken in")
@pytest.mark.parametrize("kind", ["flat", "peaked", "coarse", "equal"])
def test_rows_of_a_real_vocabulary_are_decided_without_reading_them_again(kind, monkeypatch):
    vocab = 128_256
    x = logits_of(1, vocab, seed=3, spread={"flat": 1.0, "equal": 0.0}.get(kind, 3.0))
    if kind == "peaked":
        x -= 1.1 * torch.log(torch.arange(vocab) + 5.0)
    scaled = x.bfloat16().float() if kind == "coarse" else x
    scaled = scaled - scaled.amax()
    given = {"top_p": [0.9, 0.95], "top_k": [0, 50], "min_p": [0.0, 0.0]}
    if kind == "equal":  # a top-k that keeps all of its equals does read them all
        given = {name: values[:1] for name, values in given.items()}
    settings = [torch.tensor(given[name], dtype=KINDS[name]) for name in ("top_k", "top_p", "min_p")]

    def refuse(*_):
        raise AssertionError("the guess was wrong")

    monkeypatch.setattr(filters, "_limit_in", refuse)
    scaled = scaled.repeat(len(settings[0]), 1)
    assert torch.equal(sampling.keep(scaled, *settings), spec.keep(scaled, *settings))


# Changing logits


def entries(rows, vocab, device):
    generator = torch.Generator().manual_seed(4)
    row = torch.arange(rows).repeat_interleave(90)
    ids = torch.cat([torch.randperm(vocab, generator=generator)[:90] for _ in range(rows)])
    counts = torch.randint(0, 4, (len(row),), generator=generator).float()
    factors = [torch.rand(len(row), generator=generator) + 0.5 for _ in range(3)]
    return [each.to(device) for each in (row, ids, counts, *factors)]


def test_logits_change_to_the_bits_of_the_specification(device):
    logits = logits_of(5, 400, device=device)
    row, ids, counts, *factors = entries(5, 400, device)
    for change, extra in (("penalize", (counts, *factors)), ("add_bias", factors[:1]), ("forbid", ())):
        ours, theirs = logits.clone(), logits.clone()
        getattr(sampling, change)(ours, row, ids, *extra)
        getattr(spec, change)(theirs, row, ids, *extra)
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, logits)


def test_entries_of_no_row_are_left_out(device):
    logits = logits_of(2, 30, device=device)
    row, ids = torch.tensor([-1, 1, -1], device=device), torch.tensor([3, 4, 5], device=device)
    ones = torch.ones(3, device=device)
    for change, extra in (("penalize", (ones,) * 4), ("add_bias", (ones,)), ("forbid", ())):
        changed = logits.clone()
        getattr(sampling, change)(changed, row, ids, *extra)
        assert (changed != logits).nonzero().tolist() == [[1, 4]]
        untouched = logits.clone()
        getattr(sampling, change)(untouched, row[:0], ids[:0], *(each[:0] for each in extra))
        assert torch.equal(untouched, logits)


@pytest.mark.parametrize("vocab", [30, 2048, 5003])
def test_left_out_tokens_change_to_the_bits_of_the_specification(vocab, device):
    logits, rows = logits_of(4, vocab, device=device), torch.tensor([3, 1], device=device)
    words = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), generator=torch.Generator().manual_seed(6))
    allowed = words.int().to(device)
    ours, theirs = logits.clone(), logits.clone()
    sampling.restrict(ours, rows, allowed)
    spec.restrict(theirs, rows, allowed)
    assert torch.equal(ours, theirs)
    assert torch.isinf(ours[[1, 3]]).any() and not torch.isinf(ours[[0, 2]]).any()


# Logprobs


@pytest.mark.parametrize("shape", [(1, 8), (3, 501), (4, 5003)], ids=str)
@pytest.mark.parametrize("num_top", [0, 1, 8])
def test_logprobs_ranks_and_the_best_alternatives(shape, num_top, pieces, device):
    rows, vocab = shape
    logits = logits_of(rows, vocab, seed=3, device=device)
    tokens = torch.arange(rows, device=device) * 3 % vocab
    got, expected = sampling.token_logprobs(logits, tokens, num_top), spec.token_logprobs(logits, tokens, num_top)
    for ours, theirs in zip(got, expected, strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)


def test_logprobs_among_equals_and_of_a_whole_vocabulary(monkeypatch, device):
    monkeypatch.setattr(filters, "CHUNK", 128)
    logits = logits_of(3, 300, device=device).round()
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    logits[2, 5:290] = -torch.inf
    tokens = torch.tensor([299, 3, 2], device=device)
    for num_top in (6, 300):
        got, expected = sampling.token_logprobs(logits, tokens, num_top), spec.token_logprobs(logits, tokens, num_top)
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2])
        torch.testing.assert_close(got[0], expected[0], rtol=2e-7, atol=0)
        torch.testing.assert_close(got[3], expected[3], rtol=2e-7, atol=0)


# What is refused


def test_what_does_not_fit_is_refused(device):
    logits, keys = logits_of(2, 50, device=device), keys_for(2, device=device)
    good = parameters(2, device)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        sampling.best(logits.double())
    with pytest.raises(ValueError, match="must be contiguous"):
        sampling.best(logits.T)
    with pytest.raises(ValueError, match="ids, not 0"):
        sampling.best(logits[:, :0])
    with pytest.raises(ValueError, match="keys must be"):
        sampling.sample(logits, keys[:1], *good)
    with pytest.raises(ValueError, match="top_p must be"):
        sampling.sample(logits, keys, good[0], good[1], good[2].double(), good[3])
    with pytest.raises(ValueError, match="together or not at all"):
        sampling.sample(logits, keys, good[0], None, good[2], good[3])
    with pytest.raises(ValueError, match="num_top is 51"):
        sampling.token_logprobs(logits, good[1], 51)
    with pytest.raises(ValueError, match="must be float32"):
        sampling.forbid(logits.bfloat16(), good[1], good[1])
    with pytest.raises(ValueError, match="token_ids must be"):
        sampling.add_bias(logits, good[1], good[1][:1], good[2])
    with pytest.raises(ValueError, match="allowed must be"):
        sampling.restrict(logits, good[1], torch.zeros(2, 1, dtype=torch.int32, device=device))
