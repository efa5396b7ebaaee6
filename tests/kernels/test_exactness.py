"""The exact mode, to the bit: a row's result does not depend on how many rows there are, nor on which.

Claims about oneDNN, MKL and torch's own kernels on which kernels/cpu relies are checked here, on two threads.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import linear
from kernels.ops.activation import activate, activate_and_mul, silu_and_mul
from kernels.ops.norm import layer_norm, rms_norm
from kernels.ops.rope import apply_rope_
from tests.counts import count
from tests.kernels.pages import Cache, Chunk, Heads, draw

NUM_THREADS = 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 65, 100, 128, 129, 257]

TWIN_SHAPES = [(128, 64), (344, 64), (64, 172), (389, 64), (202, 64), (64, 101), (64, 40)]
BENCH_SHAPES = [(1536, 1024), (1024, 1024), (5632, 1024), (1024, 2816)]
"""(out, in) of the 213 M model of goals.md; its head follows below with fewer row counts."""


def assert_rows_equal(compute, num_rows: int, counts: list[int]) -> None:
    """`compute(start, end)` gives the same bits for a row whichever slice of all rows it is part of."""
    whole = compute(0, num_rows)
    for num in counts:
        start = 3 * (num % 2)
        end = min(start + num, num_rows)
        assert torch.equal(compute(start, end), whole[start:end]), f"rows {start} to {end}"


@DTYPES
@pytest.mark.parametrize("shape", TWIN_SHAPES + BENCH_SHAPES)
def test_packed_linear_layers_do_not_depend_on_the_rows_beside(dtype, shape):
    counts = ROW_COUNTS if shape in TWIN_SHAPES else [1, 2, 3, 8, 16, 17, 33, 127]
    check_linear(dtype, shape, counts, packed=True)


@DTYPES
def test_the_head_of_the_bench_model_does_not_depend_on_the_rows_beside(dtype):
    x, packed = torch.randn(40, 1024).to(dtype), linear.pack_linear(torch.randn(32000, 1024).to(dtype) / 32)
    assert_rows_equal(lambda start, end: linear.linear(x[start:end], packed, exact=True), 40, [1, 2, 17])


@DTYPES
@pytest.mark.parametrize("shape", TWIN_SHAPES[:4])
def test_the_fallback_linear_layers_do_not_depend_on_the_rows_beside(dtype, shape, monkeypatch):
    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)
    check_linear(dtype, shape, ROW_COUNTS, packed=False)


def check_linear(dtype, shape, counts, *, packed):
    num_out, num_in = shape
    rows = max(counts) + 3
    x, residual = torch.randn(rows, num_in).to(dtype), torch.randn(rows, num_out).to(dtype)
    weight, bias = torch.randn(num_out, num_in).to(dtype) * num_in**-0.5, torch.randn(num_out).to(dtype)
    one = linear.pack_linear(weight, bias)
    assert one.packed == packed
    assert_rows_equal(lambda start, end: linear.linear(x[start:end], one, exact=True), rows, counts)
    if num_out % 2 == 0:
        gate = linear.pack_gated(weight, bias)
        assert_rows_equal(lambda start, end: linear.gated_linear(x[start:end], gate, exact=True), rows, counts)
    assert_rows_equal(
        lambda start, end: linear.linear_add(x[start:end], one, residual[start:end], exact=True), rows, counts
    )


@DTYPES
@pytest.mark.parametrize("width", [10, 33, 64, 1024, 4096])
def test_norms_do_not_depend_on_the_rows_beside(dtype, width):
    x, weight = torch.randn(300, width).to(dtype), torch.randn(width).to(dtype)
    assert_rows_equal(lambda start, end: rms_norm(x[start:end], weight, 1e-6, exact=True), 300, ROW_COUNTS)
    assert_rows_equal(
        lambda start, end: rms_norm(x[start:end], weight, 1e-6, plus_one=True, exact=True), 300, ROW_COUNTS
    )
    assert_rows_equal(lambda start, end: layer_norm(x[start:end], weight, weight, 1e-6, exact=True), 300, ROW_COUNTS)


@DTYPES
def test_head_norms_of_a_strided_view_do_not_depend_on_the_rows_beside(dtype):
    heads, weight = torch.randn(300, 7, 24).to(dtype), torch.randn(24).to(dtype)
    assert_rows_equal(lambda start, end: rms_norm(heads[start:end, :5], weight, 1e-6, exact=True), 300, ROW_COUNTS)


@DTYPES
@pytest.mark.parametrize("width", [101, 172])
def test_gates_do_not_depend_on_the_rows_beside(dtype, width):
    gate_up = torch.randn(300, 2 * width).to(dtype)
    assert_rows_equal(lambda start, end: silu_and_mul(gate_up[start:end], exact=True), 300, ROW_COUNTS)


@DTYPES
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu_squared"])
def test_activations_do_not_depend_on_the_rows_beside(dtype, kind):
    x = torch.randn(300, 202).to(dtype)
    assert_rows_equal(lambda start, end: activate(x[start:end], kind, exact=True), 300, ROW_COUNTS)
    assert_rows_equal(lambda start, end: activate_and_mul(x[start:end], kind, exact=True), 300, ROW_COUNTS)


@DTYPES
@pytest.mark.parametrize("head_dim", [10, 64])
def test_rope_does_not_depend_on_the_rows_beside(dtype, head_dim):
    heads, cos, sin = (torch.randn(300, *shape).to(dtype) for shape in ((7, head_dim), (head_dim,), (head_dim,)))

    def compute(start: int, end: int) -> torch.Tensor:
        return apply_rope_(heads[start:end].clone()[:, :5], cos[start:end], sin[start:end])

    assert_rows_equal(compute, 300, ROW_COUNTS)


HEADS = st.sampled_from(
    [
        Heads(),
        Heads(num_heads=2, num_kv_heads=2, head_dim=10, block_size=8),
        Heads(num_heads=8, num_kv_heads=1, head_dim=64),
        Heads(num_heads=6, num_kv_heads=2, head_dim=20, block_size=48),
    ]
)


@settings(max_examples=count("attention_schedules"), deadline=None)
@given(
    heads=HEADS,
    window=st.sampled_from([None, None, 5, 130]),
    scored=st.sampled_from(
        [(), (), ("soft_cap",), ("alibi_slopes",), ("sinks",), ("soft_cap", "alibi_slopes", "sinks")]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    lengths=st.lists(st.integers(1, 420), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
)
def test_attention_does_not_depend_on_chunks_or_on_the_rows_beside(heads, window, scored, dtype, lengths, seed):
    per_head = torch.linspace(0.01, 0.7, heads.num_heads)
    scoring = {name: 2.0 if name == "soft_cap" else per_head for name in scored}
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(lengths)]
    alone = []
    for sequence in sequences:
        alone += Cache(heads, [sequence], seed=5).step(
            [Chunk(0, 0, len(sequence.q))], window=window, exact=True, **scoring
        )
    cache = Cache(heads, sequences, seed=9)
    for chunks in random_schedule(lengths, random.Random(seed)):
        cache.let_go(chunks, window)
        results = cache.step(chunks, window=window, exact=True, **scoring)
        for chunk, result in zip(chunks, results, strict=True):
            assert torch.equal(result, alone[chunk.sequence_id][chunk.start : chunk.end]), chunk


def random_schedule(lengths: list[int], rng: random.Random) -> Iterator[list[Chunk]]:
    """Steps in which some of the sequences advance, in any order, by one token or by a chunk."""
    done = [0] * len(lengths)
    while done != lengths:
        chunks = []
        for index in rng.sample(range(len(lengths)), len(lengths)):
            end = min(lengths[index], done[index] + rng.choice([0, 1, 1, 2, 17, 64, 128, 500]))
            if end > done[index]:
                chunks.append(Chunk(index, done[index], end))
                done[index] = end
        if chunks:
            yield chunks
