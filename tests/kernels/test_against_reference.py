"""Every fast body computes what its specification says."""

import pytest
import torch

from kernels.cpu import activation, attention, choice, linear, norm, rope
from kernels.ops import linear as ops_linear
from kernels.reference import activation as activation_spec
from kernels.reference import attention as attention_spec
from kernels.reference import linear as linear_spec
from kernels.reference import norm as norm_spec
from kernels.reference import rope as rope_spec
from tests.kernels.closeness import assert_same
from tests.kernels.pages import Cache, Chunk, Heads, Sequence, draw

ROWS = [1, 2, 16, 70]
VARIANTS = [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)]
"""bfloat16 has bodies that numba compiles, and torch's where there is no numba."""
pytestmark = pytest.mark.parametrize(
    ("dtype", "compiled"), VARIANTS, ids=["float32", "bfloat16", "bfloat16-torch"], indirect=["compiled"]
)


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(choice, "is_compiled", lambda tensor: False)
    else:
        assert choice.why_not_compiled() == ""
    return request.param


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.fixture(params=["packed", "fallback"])
def packing(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(linear, "can_pack", lambda dtype: False)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_layers(dtype, rows, biased, exact, packing):
    x, residual = randn(rows, 48, dtype=dtype), randn(rows, 102, dtype=dtype)
    weight, bias = randn(102, 48, dtype=dtype) * 0.2, randn(102, dtype=dtype) if biased else None
    fast, gate = linear.pack_linear(weight, bias), linear.pack_gated(weight, bias)
    spec = linear_spec.pack_linear(weight.float(), None if bias is None else bias.float())
    assert_same(linear.linear(x, fast, exact=exact), linear_spec.linear(x.float(), spec).to(dtype))
    assert_same(
        linear.linear_add(x, fast, residual, exact=exact),
        linear_spec.linear_add(x.float(), spec, residual.float()).to(dtype),
    )
    gated = linear_spec.gated_linear(x.float(), spec).to(dtype)
    assert_same(linear.gated_linear(x, gate, exact=exact), gated)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(96, 64), (16, 32), (1008, 160), (102, 48)])
def test_linear_layers_that_keep_their_weights_by_rows(dtype, compiled, rows, shape, biased):
    dtype = dtype if compiled else torch.float32  # nothing is kept by rows there
    x, residual = randn(rows, shape[1], dtype=dtype), randn(rows, shape[0], dtype=dtype)
    weight, bias = randn(*shape, dtype=dtype) * 0.2, randn(shape[0], dtype=dtype) if biased else None
    fast = linear.pack_linear(weight, bias, by_rows=True)
    assert (fast.by_rows is not None) == (compiled and shape != (102, 48))
    gate = linear.pack_gated(weight, bias, by_rows=True)
    spec = linear_spec.pack_linear(weight.float(), None if bias is None else bias.float())
    assert_same(linear.linear(x, fast), linear_spec.linear(x.float(), spec).to(dtype))
    expected = linear_spec.linear_add(x.float(), spec, residual.float()).to(dtype)
    assert_same(linear.linear_add(x, fast, residual), expected)
    assert_same(linear.gated_linear(x, gate), linear_spec.gated_linear(x.float(), spec).to(dtype))
    exact = linear.linear(x, linear.pack_linear(weight, bias), exact=True)
    assert torch.equal(linear.linear(x, fast, exact=True), exact)


def test_the_public_door_takes_the_packed_path_on_a_cpu(dtype):
    packed = ops_linear.pack_linear(randn(8, 8, dtype=dtype))
    assert isinstance(packed, linear.PackedLinear)
    assert packed.packed
    assert packed.out_features == 8


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (70, 64), (5, 3, 24), (2, 33)])
def test_norms(dtype, shape):
    x, other, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    assert_same(norm.rms_norm(x, weight, 1e-5), norm_spec.rms_norm(x, weight, 1e-5))
    normed, total = norm.add_rms_norm(x, other, weight, 1e-5)
    expected, expected_total = norm_spec.add_rms_norm(x, other, weight, 1e-5)
    assert_same(normed, expected)
    assert_same(total, expected_total)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 2 * 101), (33, 344)])
def test_silu_and_mul(dtype, shape, exact):
    gate_up = randn(*shape, dtype=dtype)
    assert_same(activation.silu_and_mul(gate_up, exact=exact), activation_spec.silu_and_mul(gate_up))


@pytest.mark.parametrize("head_dim", [10, 64])
@pytest.mark.parametrize("tokens", ROWS)
def test_rope_on_a_view_of_a_wider_projection(dtype, tokens, head_dim):
    projected = randn(tokens, 7, head_dim, dtype=dtype)
    angles = torch.rand(tokens, head_dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = rope_spec.apply_rope_(projected[:, :5].clone(), cos, sin)
    untouched = projected[:, 5:].clone()
    assert_same(rope.apply_rope_(projected[:, :5], cos, sin), expected)
    assert torch.equal(projected[:, 5:], untouched)


HEADS = [
    Heads(),
    Heads(num_heads=4, num_kv_heads=4, head_dim=10, block_size=8),
    Heads(num_heads=8, num_kv_heads=1, head_dim=64, block_size=32),
    Heads(num_heads=14, num_kv_heads=2, head_dim=48, block_size=4),
    Heads(num_heads=6, num_kv_heads=1, head_dim=96, block_size=16),
]


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("window", [None, 1, 21])
@pytest.mark.parametrize("heads", HEADS, ids=["gqa", "mha", "mqa", "sevenfold", "wide"])
def test_attention_over_a_mixed_step(dtype, heads, window, exact):
    lengths = [1, 16, 17, 40, 100, 150]
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(lengths)]
    before = [Chunk(2, 0, 16), Chunk(3, 0, 39), Chunk(4, 0, 60), Chunk(5, 0, 149)]
    mixed = [Chunk(5, 149, 150), Chunk(0, 0, 1), Chunk(4, 60, 100), Chunk(2, 16, 17), Chunk(1, 0, 16), Chunk(3, 39, 40)]
    fast, spec = Cache(heads, sequences), Cache(heads, sequences)
    for step in (before, mixed):
        fast.let_go(step, window)
        actual = fast.step(step, body=attention, window=window, exact=exact)
        expected = spec.step(step, body=attention_spec, window=window)
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same(mine, theirs)
    assert torch.equal(fast.pool, spec.pool)


SCORINGS = {
    "capped": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "sinks": {"sinks": torch.arange(4.0)},
    "all": {"soft_cap": 2.0, "alibi_slopes": torch.tensor([0.3, 0.2, 0.1, 0.01]), "sinks": torch.arange(4.0) - 1},
}


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("name", SCORINGS)
def test_every_way_of_scoring(dtype, name, window, exact):
    lengths = [1, 17, 40, 150]
    sequences = [draw(Heads(), length, dtype, seed) for seed, length in enumerate(lengths)]
    fast, spec = Cache(Heads(), sequences), Cache(Heads(), sequences)
    for step in ([Chunk(2, 0, 39), Chunk(3, 0, 100)], [Chunk(3, 100, 150), Chunk(0, 0, 1), Chunk(2, 39, 40)]):
        actual = fast.step(step, body=attention, window=window, exact=exact, **SCORINGS[name])
        expected = spec.step(step, body=attention_spec, window=window, **SCORINGS[name])
        for mine, theirs in zip(actual, expected, strict=True):
            assert_same(mine, theirs)
    plain = spec.step(step, body=attention_spec, window=window)
    with pytest.raises(AssertionError):
        assert_same(actual[0], plain[0])


def test_attention_reads_blocks_that_rows_share_and_that_are_written_in_this_step(dtype):
    heads = Heads()
    first = draw(heads, 40, dtype, 1)
    cache = Cache(heads, [first, first])
    cache.tables[1][:2] = cache.tables[0][:2]
    spec = Cache(heads, [first])
    [expected] = spec.step([Chunk(0, 0, 40)], body=attention_spec)
    whole, tail = cache.step([Chunk(0, 0, 40), Chunk(1, 32, 40)], body=attention)
    assert_same(whole, expected)
    assert_same(tail, expected[32:])


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_a_sequence_that_overflowed_does_not_reach_the_next_owner_of_its_blocks(dtype, exact):
    heads, sequence = Heads(), draw(Heads(), 40, dtype, 1)
    [expected] = Cache(heads, [sequence]).step([Chunk(0, 0, 40)], body=attention, exact=exact)
    broken = Sequence(sequence.q, torch.full_like(sequence.kv, float("nan")))
    broken.kv[:, 0] = float("inf")
    cache = Cache(heads, [broken, sequence])
    cache.step([Chunk(0, 0, 40)], body=attention, exact=exact)
    cache.tables[1] = cache.tables[0]
    first, second = (cache.step([Chunk(1, *part)], body=attention, exact=exact)[0] for part in ((0, 20), (20, 40)))
    assert_same(torch.cat((first, second)), expected)


def test_decode_rows_of_very_different_contexts(dtype):
    heads, lengths = Heads(head_dim=8, num_heads=2, num_kv_heads=1), [3000, 5, 2900, 33, 8]
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(lengths)]
    fast, spec = Cache(heads, sequences), Cache(heads, sequences)
    for cache in (fast, spec):
        cache.step([Chunk(index, 0, length - 1) for index, length in enumerate(lengths)], body=attention)
    last = [Chunk(index, length - 1, length) for index, length in enumerate(lengths)]
    actual, expected = fast.step(last, body=attention), spec.step(last, body=attention_spec)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine, theirs)


NORMS = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
ROTATIONS = {
    "whole": (1.0, False),
    "partial": (0.4, False),
    "interleaved": (1.0, True),
    "both": (0.6, True),
    "none": (0, False),
}


@NORMS
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_all_between_projection_and_attention(dtype, compiled, tokens, head_dim, rotation, normed):
    if not compiled:
        dtype = torch.float32  # in bfloat16 torch's bodies round in between
    num_heads, num_kv_heads, block_size = 4, 2, 8
    heads = randn(tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    heads[0, num_heads, 0], heads[0, -1, 1] = float("nan"), float("inf")
    share, interleaved = ROTATIONS[rotation]
    angles = torch.rand(tokens, int(head_dim * share) // 2).repeat(1, 2) * 6
    cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if share else (None, None)
    flags = {"interleaved": interleaved, "plus_one": rotation == "partial"}
    weights = [randn(head_dim, dtype=dtype) if normed else None for _ in range(2)]
    pools = [torch.zeros(12, 3, 2, num_kv_heads, block_size, head_dim, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(12 * block_size)[:tokens]
    starts, contexts, tables = list(range(tokens + 1)), [1] * tokens, (slots // block_size)[:, None].int()
    plan = attention.plan_attention(pools[0], starts, contexts, tables, slots, num_heads=num_heads)
    expected = rope_spec.rope_and_write_kv(
        heads.clone(), pools[1], 1, slots, torch.arange(tokens), cos, sin,
        q_norm=weights[0], k_norm=weights[1], eps=1e-5, **flags,
    )  # fmt: skip
    actual = attention.rotate_and_write(
        heads.clone(), pools[0], 1, plan, cos, sin, q_norm=weights[0], k_norm=weights[1], eps=1e-5, **flags
    )
    assert_same(actual, expected)
    assert_same(pools[0], pools[1])


def test_a_query_that_is_not_a_number_is_seen_in_the_answer(dtype):
    """A step whose numbers broke has to fail, not to go on with others."""
    heads, length = Heads(head_dim=64), 40
    sequence = draw(heads, length, dtype, 1)
    cache = Cache(heads, [sequence])
    cache.step([Chunk(0, 0, length - 1)], body=attention)
    sequence.q[-1, 0, 3] = float("nan")
    [last] = cache.step([Chunk(0, length - 1, length)], body=attention)
    assert last[0, 0].isnan().any()
    assert last[0, 2:].isfinite().all()
    assert (
        norm.rms_norm(torch.full((1, 64), float("nan"), dtype=dtype), torch.ones(64, dtype=dtype), 1e-5).isnan().all()
    )
    assert activation.silu_and_mul(torch.full((1, 64), float("nan"), dtype=dtype)).isnan().all()
