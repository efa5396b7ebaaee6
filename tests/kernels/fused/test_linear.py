"""Products with a constant weight against their specification, by every kind of configuration."""

import msgspec
import pytest
import torch

from kernels.fused import linear
from kernels.ops import choice
from kernels.ops import linear as ops
from kernels.reference import linear as spec
from kernels.tuning.candidates import BUCKETS, Config, Weight, default
from kernels.tuning.table import Ceilings, Device, Row, Table
from tests.kernels.closeness import assert_same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
CONFIGS = {
    "whole": Config(16, 32, 32, 4, 2),
    "split": Config(16, 32, 16, 4, 2, split=3),
    "swapped": Config(16, 32, 32, 4, 2, swapped=True),
    "swapped-split": Config(32, 16, 16, 4, 2, split=2, swapped=True),
}
SHAPES = [(40, 72), (32, 64), (7, 33)]
"""(out, in): ragged, whole tiles, and odd."""


def table_of(config: Config | None, *weights: Weight) -> Table:
    """A table that knows one choice."""
    rows = tuple(
        Row(weight.op, weight.out_features, weight.in_features, weight.dtype, bucket, config, 1.0, 1.0, 1.0)
        for weight in weights
        for bucket in BUCKETS
    )
    return Table(Device("none", (0, 0), ""), "", "", Ceilings(1.0, 1.0), rows)


def described(op: str, weight: torch.Tensor) -> Weight:
    halves = 2 if op == "gated_linear" else 1
    return Weight(op, weight.shape[0] // halves, weight.shape[1], str(weight.dtype).removeprefix("torch."))


def packed_with(config: Config | None, weight: torch.Tensor, bias: torch.Tensor | None = None):
    table = table_of(config, *(described(op, weight) for op in ("linear", "linear_add")))
    return linear.pack_linear(weight, bias, table=table)


def gate_with(config: Config | None, weight: torch.Tensor, bias: torch.Tensor | None = None):
    return linear.pack_gated(weight, bias, table=table_of(config, described("gated_linear", weight)))


class Drawn:
    """x, residual, weight, bias of a product, and of a gated one; and what the specification makes of them."""

    def __init__(self, rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str, *, biased: bool = True):
        width, depth = shape

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.dtype = dtype
        self.x, self.residual = randn(rows, depth), randn(rows, width)
        self.weight, self.gate = randn(width, depth), randn(2 * width, depth) * 0.3
        self.bias, self.gate_bias = (randn(width), randn(2 * width)) if biased else (None, None)

    def spec(self, name: str, *more: torch.Tensor) -> torch.Tensor:
        gated = name == "gated_linear"
        weight, bias = (self.gate, self.gate_bias) if gated else (self.weight, self.bias)
        packed = spec.pack_linear(weight.float(), None if bias is None else bias.float())
        return getattr(spec, name)(self.x.float(), packed, *(tensor.float() for tensor in more)).to(self.dtype)


def check(drawn: Drawn, config: Config | None, *, exact: bool = False) -> None:
    packed = packed_with(config, drawn.weight, drawn.bias)
    gate = gate_with(config, drawn.gate, drawn.gate_bias)
    rooms = [choice.room for plan in (packed.plain, gate.plan) for _, choice in plan.exact]
    poison(*rooms, linear.workspace(drawn.x.device))
    assert_same(linear.linear(drawn.x, packed, exact=exact), drawn.spec("linear"))
    added = linear.linear_add(drawn.x, packed, drawn.residual, exact=exact)
    assert_same(added, drawn.spec("linear_add", drawn.residual))
    assert_same(linear.gated_linear(drawn.x, gate, exact=exact), drawn.spec("gated_linear"))


def poison(*rooms: linear.Workspace | None) -> None:
    for room in rooms:
        if room is not None:
            room.partials.fill_(float("nan"))


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel does not write is not a number."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **named):
        made = new_empty(self, *arguments, **named)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@DTYPES
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", [*CONFIGS.values(), None], ids=[*CONFIGS, "cublas"])
def test_every_kind_of_configuration(config, shape, biased, dtype, device):
    check(Drawn(5, shape, dtype, device, biased=biased), config)


@DTYPES
@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_do_not_fill_their_tiles(name, rows, dtype, device):
    check(Drawn(rows, (40, 48), dtype, device), CONFIGS[name])


def test_more_tiles_of_rows_than_a_group_holds(device):
    check(Drawn(16 * linear.GROUP_TILES + 20, (36, 48), torch.float32, device), CONFIGS["split"])


@DTYPES
def test_the_choices_without_a_table(dtype, device):
    drawn = Drawn(20, (70, 136), dtype, device)
    packed, gate = linear.pack_linear(drawn.weight, drawn.bias), linear.pack_gated(drawn.gate, drawn.gate_bias)
    for exact in (False, True):
        assert_same(linear.linear(drawn.x, packed, exact=exact), drawn.spec("linear"))
        assert_same(
            linear.linear_add(drawn.x, packed, drawn.residual, exact=exact), drawn.spec("linear_add", drawn.residual)
        )
        assert_same(linear.gated_linear(drawn.x, gate, exact=exact), drawn.spec("gated_linear"))
    assert (packed.out_features, gate.out_features) == (70, 70)


@DTYPES
def test_rows_that_lie_apart(dtype, device):
    drawn = Drawn(5, (40, 48), dtype, device)
    packed = packed_with(CONFIGS["split"], drawn.weight, drawn.bias)
    wide, wide_residual = torch.full((2, 5, 100), float("nan"), dtype=dtype, device=device)
    wide[:, 7:55], wide_residual[:, 3:43] = drawn.x, drawn.residual
    x, residual = wide[:, 7:55], wide_residual[:, 3:43]
    assert_same(linear.linear(x, packed), drawn.spec("linear"))
    assert_same(linear.linear_add(x, packed, residual), drawn.spec("linear_add", drawn.residual))
    assert_same(linear.linear_add(x[2:3], packed, residual[2:3])[0], drawn.spec("linear_add", drawn.residual)[2])


@pytest.mark.parametrize("config", [CONFIGS["split"], None], ids=["kernel", "cublas"])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_no_rows(config, exact, device):
    weight = torch.randn(40, 48, device=device)
    x, packed = torch.empty(0, 48, device=device), packed_with(config, weight)
    assert linear.linear(x, packed, exact=exact).shape == (0, 40)
    assert linear.linear_add(x, packed, x.new_empty(0, 40), exact=exact).shape == (0, 40)
    assert linear.gated_linear(x, gate_with(config, weight), exact=exact).shape == (0, 20)


def test_a_product_leaves_its_inputs_and_gives_all_tickets_back(device):
    drawn = Drawn(5, (40, 48), torch.float32, device)
    packed = packed_with(CONFIGS["split"], drawn.weight, drawn.bias)
    x, residual = drawn.x.clone(), drawn.residual.clone()
    first = linear.linear_add(drawn.x, packed, drawn.residual)
    assert torch.equal(first, linear.linear_add(drawn.x, packed, drawn.residual))
    assert torch.equal(drawn.x, x)
    assert torch.equal(drawn.residual, residual)
    assert linear.workspace(drawn.x.device).tickets.count_nonzero() == 0


def test_a_workspace_keeps_what_a_captured_graph_may_hold(device):
    room = linear.Workspace(torch.device(device))
    room.reserve(10, 4)
    held = room.partials
    room.reserve(5, 2)
    assert room.partials is held
    room.reserve(20, 4)
    assert room.partials.numel() == 20
    assert any(old is held for old in room._outgrown)


EXACT_SHAPES = [(40, 520), (33, 72)]
"""K in parts or not, in either dtype."""


@DTYPES
@pytest.mark.parametrize("shape", EXACT_SHAPES, ids=str)
def test_the_bits_of_an_exact_row_depend_on_no_other_row(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(linear, "SPREAD_ROWS", 20)  # above them one program adds all parts
    drawn = Drawn(45, shape, dtype, device)
    packed, gate = linear.pack_linear(drawn.weight, drawn.bias), linear.pack_gated(drawn.gate, drawn.gate_bias)
    whole = (
        linear.linear(drawn.x, packed, exact=True),
        linear.linear_add(drawn.x, packed, drawn.residual, exact=True),
        linear.gated_linear(drawn.x, gate, exact=True),
    )
    assert_same(whole[0], drawn.spec("linear"))
    for start, end in ((0, 1), (44, 45), (3, 6), (20, 37), (1, 40)):
        x, residual = drawn.x[start:end], drawn.residual[start:end]
        assert torch.equal(linear.linear(x, packed, exact=True), whole[0][start:end])
        assert torch.equal(linear.linear_add(x, packed, residual, exact=True), whole[1][start:end])
        assert torch.equal(linear.gated_linear(x, gate, exact=True), whole[2][start:end])


def test_an_exact_configuration_cuts_k_in_both_ways_and_knows_no_table(device):
    weight = torch.randn(40, 1040, device=device)
    plans = [linear.pack_linear(weight).plain, packed_with(CONFIGS["swapped-split"], weight).plain]
    for plan in plans:
        (_, spread), (_, serial) = plan.exact
        assert spread.constants["split"] == serial.constants["split"] == 8
        assert (spread.room is None, serial.room is None) == (False, True)
        tiles = [{k: v for k, v in one.constants.items() if k != "spread"} for one in (spread, serial)]
        assert tiles[0] == tiles[1]
        assert tiles[0] == {k: v for k, v in plans[0].exact[0][1].constants.items() if k != "spread"}


@pytest.mark.parametrize(
    ("weight", "tiles"),
    [
        (Weight("linear", 6144, 4096), {128: (64, 4, True), 256: (128, 4, True), 384: (64, 4, False)}),
        (Weight("linear", 6144, 4096), {385: (128, 4, False), 9000: (128, 4, False)}),
        (Weight("linear_add", 1024, 1024), {256: (64, 4, True), 2944: (64, 4, False), 2945: (128, 4, False)}),
        (Weight("linear", 128_256, 4096), {128: (64, 1, False), 256: (256, 1, False), 9000: (256, 1, False)}),
        (Weight("gated_linear", 14336, 4096), {128: (64, 1, False), 129: (128, 1, False), 9000: (128, 1, False)}),
    ],
)  # fmt: skip
def test_many_exact_rows_take_larger_tiles_in_the_same_parts(weight, tiles):
    choices = linear._exact_choices(weight, 227 * 1024, torch.device("meta"))
    for num_rows, (tile_rows, split, spread) in tiles.items():
        choice = next(choice for most_rows, choice in choices if num_rows <= most_rows)
        constants = choice.constants
        assert (choice.tile_rows, constants["split"], constants["spread"]) == (tile_rows, split, spread), num_rows
        assert constants["block_k"] == 64


def test_every_exact_configuration_is_declared_by_some_number_of_rows():
    plan = linear.make_plan(Weight("linear", 1024, 1024), torch.device("meta"))
    used = {id(plan.choice(num_rows, True)) for num_rows in linear.exact_row_counts(plan)}
    assert used == {id(choice) for _, choice in plan.exact}


@DTYPES
@pytest.mark.skipif(not torch.cuda.is_available(), reason="large tiles of an interpreter prove nothing")
@pytest.mark.parametrize("shape", [(1024, 512), (1000, 4096), (4096, 1040)], ids=str)
def test_large_exact_tiles_have_the_bits_of_small_ones(shape, dtype, device):
    drawn = Drawn(2600, shape, dtype, device)
    packed, gate = linear.pack_linear(drawn.weight, drawn.bias), linear.pack_gated(drawn.gate, drawn.gate_bias)
    for name, weight, residual in (
        ("linear", packed, ()), ("linear_add", packed, (drawn.residual,)), ("gated_linear", gate, ())
    ):  # fmt: skip
        whole = getattr(linear, name)(drawn.x, weight, *residual, exact=True)
        for start, end in ((0, 1), (5, 69), (100, 300), (256, 256 + 700), (13, 2600)):
            part = getattr(linear, name)(
                drawn.x[start:end], weight, *(each[start:end] for each in residual), exact=True
            )
            assert torch.equal(part, whole[start:end]), (name, start, end)


def test_a_table_chooses_by_rows():
    weight = torch.randn(40, 48).to(torch.bfloat16)
    known = described("linear", weight)
    rows = {1: CONFIGS["swapped"], 8: None, 2048: CONFIGS["split"]}
    table = table_of(None, known)
    table = msgspec.structs.replace(
        table, rows=tuple(msgspec.structs.replace(row, config=rows[row.rows]) for row in table.rows if row.rows in rows)
    )
    plan = linear.pack_linear(weight, table=table).plain
    assert plan.choice(1, False).constants["swapped"]
    assert plan.choice(5, False) is plan.choice(8, False) is None
    assert plan.choice(5000, False).constants["split"] == 3
    assert plan.choice(16, False).tile_rows == default(known, 16).tile_rows
    assert plan.choice(5, True) is plan.exact[0][1]
    assert plan.choice(50_000, True) is plan.exact[-1][1]


def test_what_does_not_fit_is_refused(device):
    packed = linear.pack_linear(torch.randn(8, 16, device=device))
    x, residual = torch.randn(3, 16, device=device), torch.randn(3, 8, device=device)
    for wrong in (x[:, :8], x.double(), x.t(), x[None], x.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="for a weight"):
            linear.linear(wrong, packed)
    for wrong in (residual[:2], residual.double(), residual.repeat(1, 2)[:, ::2], x):
        with pytest.raises(ValueError, match="residual"):
            linear.linear_add(x, packed, wrong)
    with pytest.raises(ValueError, match="two halves"):
        linear.pack_gated(torch.randn(7, 16, device=device))
    with pytest.raises(ValueError, match="bias"):
        linear.pack_linear(torch.randn(8, 16, device=device), torch.randn(7, device=device))
    for weight in (torch.randn(8, device=device), torch.randint(9, (8, 16), device=device)):
        with pytest.raises(ValueError, match="a matrix of"):
            linear.pack_linear(weight)


def test_the_public_door_opens_to_the_fused_body(device, monkeypatch):
    monkeypatch.setattr(choice, "is_fused", lambda tensor: True)
    drawn = Drawn(3, (40, 48), torch.bfloat16, device)
    packed, gate = ops.pack_linear(drawn.weight, drawn.bias), ops.pack_gated(drawn.gate, drawn.gate_bias)
    assert isinstance(packed, linear.PackedLinear)
    assert_same(ops.linear(drawn.x, packed), drawn.spec("linear"))
    assert_same(ops.linear_add(drawn.x, packed, drawn.residual), drawn.spec("linear_add", drawn.residual))
    assert_same(ops.gated_linear(drawn.x, gate, exact=True), drawn.spec("gated_linear"))


def test_a_weight_at_an_odd_address_is_moved(device):
    weight = torch.randn(8 * 16 + 1, device=device)[1:].view(8, 16)
    packed = linear.pack_linear(weight)
    assert packed.weight.data_ptr() % 16 == 0
    assert torch.equal(packed.weight, weight)
