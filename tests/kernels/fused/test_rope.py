"""Rope and the KV write in one launch, against their specification."""

from dataclasses import dataclass

import pytest
import torch

from kernels.cpu import rope as cpu
from kernels.fused import rope
from kernels.ops.rope import rope_and_write_kv as through_the_door
from kernels.reference import rope as spec
from tests.kernels.closeness import assert_same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
POISON = 77.0
LAYERS, LAYER = 3, 1
NUM_BLOCKS = 5
POSITIONS = 40


@dataclass(frozen=True)
class Case:
    """What a model fixes; `rotary_dim` None: no rope."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int | None = 16
    interleaved: bool = False
    normed: bool = False
    plus_one: bool = False
    block_size: int = 8

    def inputs(self, tokens, dtype, device, ids=torch.int64):
        qkv = torch.randn(tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim, device=device).to(dtype)
        shape = (NUM_BLOCKS, LAYERS, 2, self.num_kv_heads, self.block_size, self.head_dim)
        pool = torch.full(shape, POISON, dtype=dtype, device=device)
        slots = torch.randperm(NUM_BLOCKS * self.block_size, device=device)[:tokens].to(ids)
        return [qkv, pool, LAYER, slots, *self.tables(tokens, dtype, device, ids)]

    def tables(self, tokens, dtype, device, ids):
        if self.rotary_dim is None:
            return [None, None, None]
        angles = (torch.rand(POSITIONS, self.rotary_dim // 2, device=device) * 6).repeat(1, 2)
        positions = torch.randint(POSITIONS, (tokens,), device=device).to(ids)
        return [positions, angles.cos().to(dtype), angles.sin().to(dtype)]

    def flags(self, dtype, device):
        if not self.normed:
            return {"interleaved": self.interleaved}
        q_norm, k_norm = torch.randn(2, self.head_dim, device=device).to(dtype)
        weights = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6, "plus_one": self.plus_one}
        return {"interleaved": self.interleaved, **weights}


CASES = [
    Case(),
    Case(normed=True),
    Case(interleaved=True),
    Case(interleaved=True, normed=True, plus_one=True, num_heads=3, num_kv_heads=3),
    Case(rotary_dim=None),
    Case(rotary_dim=None, normed=True),
    Case(rotary_dim=4, head_dim=20, num_heads=5, num_kv_heads=1),
    Case(rotary_dim=6, head_dim=10, interleaved=True, normed=True, block_size=3),
    Case(rotary_dim=2, head_dim=7, normed=True, plus_one=True),
    Case(num_heads=40, num_kv_heads=20, head_dim=96, rotary_dim=96),
    Case(num_heads=7, num_kv_heads=1, head_dim=128, rotary_dim=64, normed=True),
]


def copied(inputs):
    return [each.clone() if isinstance(each, torch.Tensor) else each for each in inputs]


def check(mine, theirs, q, expected_q):
    """q and pages are what the specification says; what it left alone is alone."""
    assert_same(q, expected_q)
    untouched = theirs[1] == POISON
    assert torch.equal(mine[1][untouched], theirs[1][untouched])
    assert_same(mine[1].masked_fill(untouched, 0), theirs[1].masked_fill(untouched, 0))


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout(dtype, case, device):
    inputs, flags = case.inputs(6, dtype, device), case.flags(dtype, device)
    mine, theirs = copied(inputs), copied(inputs)
    q, expected_q = rope.rope_and_write_kv(*mine, **flags), spec.rope_and_write_kv(*theirs, **flags)
    check(mine, theirs, q, expected_q)
    assert q.data_ptr() == mine[0].data_ptr()
    assert torch.equal(mine[0][:, case.num_heads :], inputs[0][:, case.num_heads :])
    kv = mine[1][mine[3] // case.block_size, LAYER, :, :, mine[3] % case.block_size]
    assert torch.equal(kv[:, 1], inputs[0][:, case.num_heads + case.num_kv_heads :])


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_float32_without_a_norm_is_equal_to_the_bit(case, device):
    mine = case.inputs(5, torch.float32, device)
    theirs, flags = copied(mine), {"interleaved": case.interleaved}
    assert torch.equal(rope.rope_and_write_kv(*mine, **flags), spec.rope_and_write_kv(*theirs, **flags))
    assert torch.equal(mine[1], theirs[1])


@DTYPES
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_padding_tokens_write_nothing_and_look_up_nothing(dtype, ids, device):
    case = Case(normed=True)
    inputs, flags = case.inputs(6, dtype, device, ids), case.flags(dtype, device)
    inputs[3][torch.tensor([0, 3, 5])] = torch.tensor([-1, -8, -1], dtype=ids, device=device)
    inputs[4][torch.tensor([0, 3, 5])] = torch.tensor([2**31 - 1, -1, -(2**31)], dtype=ids, device=device)
    mine, theirs = copied(inputs), copied(inputs)
    q, expected_q = rope.rope_and_write_kv(*mine, **flags), spec.rope_and_write_kv(*theirs, **flags)
    check(mine, theirs, q, expected_q)
    assert torch.equal(mine[0][[0, 3, 5]], inputs[0][[0, 3, 5]])


@DTYPES
def test_q_may_go_elsewhere(dtype, device):
    case = Case(normed=True, num_heads=6)
    inputs, flags = case.inputs(5, dtype, device), case.flags(dtype, device)
    mine, theirs = copied(inputs), copied(inputs)
    wide = torch.full((5, 8, 32), POISON, dtype=dtype, device=device)
    out = wide[:, 1:7, 16:]
    assert rope.rope_and_write_kv(*mine, **flags, out=out) is out
    check(mine, theirs, out, spec.rope_and_write_kv(*theirs, **flags))
    assert torch.equal(mine[0], inputs[0])
    out.fill_(POISON)
    assert bool((wide == POISON).all())


@DTYPES
def test_k_and_v_alone(dtype, device):
    case = Case(num_heads=0, rotary_dim=None)
    mine = case.inputs(5, dtype, device)
    wide = torch.cat((mine[0], mine[0]), dim=1)
    mine[0] = wide[:, 2:6]
    theirs = copied(mine)
    assert rope.rope_and_write_kv(*mine).shape == spec.rope_and_write_kv(*theirs).shape == (5, 0, 16)
    assert torch.equal(mine[1], theirs[1])
    assert torch.equal(wide[:, :4], wide[:, 4:])
    rotating = Case(num_heads=0, normed=True)
    mine, flags = rotating.inputs(5, dtype, device), rotating.flags(dtype, device)
    theirs = copied(mine)
    rope.rope_and_write_kv(*mine, **flags)
    spec.rope_and_write_kv(*theirs, **flags)
    assert_same(mine[1], theirs[1])


def test_q_goes_elsewhere_without_a_rope_too(device):
    case = Case(rotary_dim=None)
    inputs = case.inputs(5, torch.float32, device)
    out = torch.empty(5, case.num_heads, case.head_dim, device=device)
    assert torch.equal(rope.rope_and_write_kv(*inputs, out=out), inputs[0][:, : case.num_heads])


@DTYPES
def test_a_strided_projection_and_a_strided_pool(dtype, device):
    case = Case()
    inputs = case.inputs(5, dtype, device)
    theirs = copied(inputs)
    wide = torch.full((5, 9, 24), POISON, dtype=dtype, device=device)
    qkv = wide[:, 1:, :16].copy_(inputs[0])
    pool = torch.full((NUM_BLOCKS, LAYERS + 1, 2, 4, 8, 16), POISON, dtype=dtype, device=device)[:, 1:, :, 1:3]
    positions, cos, sin = inputs[4:]
    tables = [torch.cat((each, each), dim=1)[:, :16] for each in (cos, sin)]
    mine = [qkv, pool, LAYER, inputs[3], positions, *tables]
    check(mine, theirs, rope.rope_and_write_kv(*mine), spec.rope_and_write_kv(*theirs))
    assert bool((wide[:, 0] == POISON).all())
    assert bool((wide[:, :, 16:] == POISON).all())


@DTYPES
def test_what_is_not_finite_is_written_as_zero(dtype, device):
    case = Case(rotary_dim=8)
    inputs = case.inputs(3, dtype, device)
    q_heads = case.num_heads
    inputs[0][0, q_heads:] = float("nan")
    inputs[0][1, q_heads, 3], inputs[0][1, q_heads + 2, 5] = float("inf"), -float("inf")
    inputs[0][2, q_heads, :2] = torch.finfo(dtype).max  # turns to more than the dtype holds
    mine, theirs = copied(inputs), copied(inputs)
    check(mine, theirs, rope.rope_and_write_kv(*mine), spec.rope_and_write_kv(*theirs))
    assert bool(mine[1].isfinite().all())


@pytest.mark.parametrize("case", [Case(normed=True), Case(interleaved=True, head_dim=24, rotary_dim=8)], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_tokens_beside(case, device):
    inputs, flags = case.inputs(9, torch.bfloat16, device), case.flags(torch.bfloat16, device)
    whole = copied(inputs)
    q = rope.rope_and_write_kv(*whole, **flags)
    parts = copied(inputs)
    for part in (slice(8, 9), slice(0, 3), slice(3, 8)):
        qkv, pool, layer, slots, positions, cos, sin = parts
        rope.rope_and_write_kv(qkv[part], pool, layer, slots[part], positions[part], cos, sin, **flags)
    assert torch.equal(parts[0][:, : case.num_heads], q)
    assert torch.equal(parts[1], whole[1])


def test_offsets_beyond_two_to_the_31(device):
    """A pool whose blocks lie 2**30 elements apart, in memory that only promises to be there."""
    apart = 2**30
    storage = torch.empty(4 * apart, dtype=torch.float16, device="cpu" if device == "cpu" else device)
    pool = storage.as_strided((4, 1, 2, 1, 2, 8), (apart, 32, 16, 16, 8, 1))
    pool[3].zero_()
    qkv = torch.randn(1, 3, 8, device=device).half()
    rope.rope_and_write_kv(qkv, pool, 0, torch.tensor([7], device=device))
    assert torch.equal(pool[3, 0, :, :, 1], qkv[0, 1:, None])
    assert not bool(pool[3, 0, :, :, 0].any())


def test_no_tokens(device):
    mine = Case().inputs(0, torch.float32, device)
    assert rope.rope_and_write_kv(*mine).shape == (0, 4, 16)
    assert bool((mine[1] == POISON).all())


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (0, torch.zeros(6, 8, 12)),
        (0, torch.zeros(6, 3, 16)),
        (0, torch.zeros(6, 8, 16, dtype=torch.float16)),
        (0, torch.zeros(6, 16, 8).transpose(1, 2)),
        (1, torch.zeros(5, 3, 2, 2, 8)),
        (2, 3),
        (3, torch.zeros(5, dtype=torch.int64)),
        (3, torch.zeros(6)),
        (3, torch.zeros(12, dtype=torch.int64)[::2]),
        (4, None),
        (5, torch.zeros(40, 18)),
        (6, None),
        (6, torch.zeros(40, 8)),
    ],
)
def test_what_does_not_fit_is_refused(index, wrong):
    inputs = Case().inputs(6, torch.float32, "cpu")
    inputs[index] = wrong
    with pytest.raises(ValueError, match=r"must be|does not hold|layer_id|given together|is torch\."):
        rope.rope_and_write_kv(*inputs)


@pytest.mark.parametrize("wrong", [{"q_norm": torch.ones(8)}, {"k_norm": torch.ones(1)}, {"out": torch.ones(6, 3, 16)}])
def test_an_option_that_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        rope.rope_and_write_kv(*Case().inputs(6, torch.float32, "cpu"), **wrong)


@pytest.mark.parametrize("cut", [0, 3, 17])
def test_an_odd_rotary_dim_is_refused(cut):
    inputs = Case(head_dim=18, rotary_dim=18).inputs(6, torch.float32, "cpu")
    inputs[5:] = (table[:, :cut] for table in inputs[5:])
    with pytest.raises(ValueError, match="must be even"):
        rope.rope_and_write_kv(*inputs)


@DTYPES
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(16, False), (16, True), (6, False), (6, True)])
def test_the_cpu_body_and_the_door(dtype, rotary_dim, interleaved):
    """On a CPU two operations do the same, and round in between."""
    case = Case(rotary_dim=rotary_dim, interleaved=interleaved)
    inputs = case.inputs(7, dtype, "cpu")
    expected = copied(inputs)
    q = spec.rope_and_write_kv(*expected, interleaved=interleaved)
    _, _, _, slots, positions, cos, sin = inputs
    heads = inputs[0].clone()[:, :6]
    assert_same(cpu.apply_rope_(heads, cos[positions], sin[positions], interleaved=interleaved)[:, :4], q)
    keys = expected[1][slots // case.block_size, LAYER, 0, :, slots % case.block_size]
    assert_same(heads[:, 4:], keys)
    assert torch.equal(through_the_door(*copied(inputs), interleaved=interleaved), q)
