"""Products with a constant weight: bias, residual and gate in the same launch, K split where rows are few.

One kernel, many configurations (kernels/tuning): narrow tiles whose K is cut into parts for decode batches, large tiles
for prompts; cuBLAS where it was measured faster, or where nothing was measured and rows are many. The choice for every
number of rows is made once, when a weight is packed; a call looks up a list.

Split K: each part goes to a float32 workspace, then its program draws a ticket of its tile. The program that draws the
last one adds all parts in their order, finishes, and puts the tickets back to zero. No value is added atomically, so
the result does not depend on who came last. A second launch would do the same, but would begin only when the first has
ended, four times a layer, where a whole product takes some ten microseconds. Calls must not overlap on one device: its
weights share one workspace, as one stream runs them.

Exactness: whatever the number of rows, a weight's K is cut into the same parts and walked in the same steps. A part is
summed from zero whether its program does it alone (few rows) or one program does all parts in turn (many), and parts
are added in the same order. The size of the tile changes no bit; large ones serve many rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.activation import silu_and_mul
from kernels.fused.launch import ALIGNMENT, capability, launch
from kernels.tuning import candidates
from kernels.tuning.candidates import BUCKETS, Config, Weight
from kernels.tuning.table import Device, Table, Tables

GROUP_TILES = 8
"""Tiles of rows that neighbouring programs share, so that a weight's tile is read from L2 by the others."""
SMALL_ROWS, SPREAD_ROWS = 128, 256
"""Of an exact step: up to so many rows small tiles are faster; and up to so many each part of K has its own program."""
FEW_PROGRAMS = 96
"""More rows take large tiles, unless these are fewer than this: an H200 has 132 multiprocessors."""
READ_AHEAD = tl.constexpr(8192)
"""Elements of parts that a program reads before it adds them: 64 registers of 128 threads."""
ANY_ROWS = 2**62
TABLES = Tables(Path(candidates.__file__).parent / "tables")


@triton.jit
def _load(tile, at, start, depth, inside, in_features: tl.constexpr, block_k: tl.constexpr):
    if in_features % block_k != 0:
        inside = inside & (start + depth < in_features)[None, :]
    return tl.load(tile + start + at, mask=inside, other=0.0)


@triton.jit
def _multiply(x, weight, total, swapped: tl.constexpr):
    if swapped:
        return tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _sum_part(
    x, weight, rows_left, columns_left, part, num_parts,
    in_features: tl.constexpr, out_features: tl.constexpr, x_stride: tl.constexpr, gated: tl.constexpr,
    swapped: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One part of K: the product [block_m, block_n], and another with the upper half of the weight where gated.

    How many parts there are is no constant here: a loop whose length is known gets unrolled until registers spill.
    """
    steps: tl.constexpr = (in_features + block_k - 1) // block_k
    height: tl.constexpr = block_n if swapped else block_m
    width: tl.constexpr = block_m if swapped else block_n
    rows, columns, depth = tl.arange(0, block_m), tl.arange(0, block_n), tl.arange(0, block_k)
    x_at = rows[:, None] * x_stride + depth[None, :]
    weight_at = columns[:, None] * in_features + depth[None, :]
    x_inside = (rows < rows_left)[:, None]
    inside = (columns < (block_n if out_features % block_n == 0 else columns_left))[:, None]
    total = tl.zeros((height, width), tl.float32)
    up_total = total
    for step in range(part * steps // num_parts, (part + 1) * steps // num_parts):
        start = step * block_k
        rows_tile = _load(x, x_at, start, depth, x_inside, in_features, block_k)
        tile = _load(weight, weight_at, start, depth, inside, in_features, block_k)
        total = _multiply(rows_tile, tile, total, swapped)
        if gated:
            upper = weight + out_features * in_features
            tile = _load(upper, weight_at, start, depth, inside, in_features, block_k)
            up_total = _multiply(rows_tile, tile, up_total, swapped)
    if swapped:
        total = tl.trans(total)
        up_total = tl.trans(up_total)
    return total, up_total


@triton.jit
def _add_parts(
    partials, size, at, mask,
    block_m: tl.constexpr, block_n: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """The sum of all parts, in their order; of a small tile several are read before the first is added."""
    fitting: tl.constexpr = READ_AHEAD // (block_m * block_n)
    ahead: tl.constexpr = split if fitting >= split else (fitting if fitting > 1 and split % fitting == 0 else 1)
    total = tl.zeros((block_m, block_n), tl.float32)
    for first in tl.range(0, split, ahead, num_stages=1):
        for i in tl.static_range(ahead):
            total += tl.load(partials + (first + i) * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _finish(
    value, up, bias, residual, out, row, first_column, column, mask,
    out_features: tl.constexpr, residual_stride: tl.constexpr, gated: tl.constexpr,
):  # fmt: skip
    if bias is not None:
        inside = first_column + column < out_features
        value += tl.load(bias + first_column + column, mask=inside, other=0.0).to(tl.float32)
        if gated:
            up += tl.load(bias + out_features + first_column + column, mask=inside, other=0.0).to(tl.float32)
    if gated:
        value = value * tl.sigmoid(value) * up
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_features + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _linear_kernel(
    x, weight, bias, residual, out, partials, tickets, num_rows, num_parts,
    in_features: tl.constexpr, out_features: tl.constexpr, x_stride: tl.constexpr, residual_stride: tl.constexpr,
    gated: tl.constexpr, swapped: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
    split: tl.constexpr, spread: tl.constexpr, group: tl.constexpr,
):  # fmt: skip
    parts_here: tl.constexpr = split if spread else 1
    tile, part = tl.program_id(0) // parts_here, tl.program_id(0) % parts_here
    column_tiles: tl.constexpr = (out_features + block_n - 1) // block_n
    group_start = tile // (group * column_tiles) * group
    group_rows = tl.minimum(tl.cdiv(num_rows, block_m) - group_start, group)
    tile_in_group = tile % (group * column_tiles)
    first_row = ((group_start + tile_in_group % group_rows) * block_m).to(tl.int64)
    first_column = tile_in_group // group_rows * block_n
    x_tile, weight_tile = x + first_row * x_stride, weight + first_column.to(tl.int64) * in_features
    rows_left, columns_left = num_rows - first_row, out_features - first_column

    row, column = tl.arange(0, block_m)[:, None], tl.arange(0, block_n)[None, :]
    mask = (row < rows_left) & (column < columns_left)
    start, at = first_row * out_features + first_column, row * out_features + column
    out += start
    if residual is not None:
        residual += first_row * residual_stride + first_column
    if spread or split == 1:
        value, up = _sum_part(
            x_tile, weight_tile, rows_left, columns_left, part, num_parts, in_features, out_features, x_stride, gated,
            swapped, block_m, block_n, block_k,
        )  # fmt: skip
    else:
        value = tl.zeros((block_m, block_n), tl.float32)
        up = value
        for i in range(num_parts):
            more, up_more = _sum_part(
                x_tile, weight_tile, rows_left, columns_left, i, num_parts, in_features, out_features, x_stride, gated,
                swapped, block_m, block_n, block_k,
            )  # fmt: skip
            value += more
            if gated:
                up += up_more
    is_last = True
    if spread:
        size = num_rows.to(tl.int64) * out_features
        partials += start
        up_partials = partials + size * split
        tl.store(partials + part * size + at, value, mask=mask)
        if gated:
            tl.store(up_partials + part * size + at, up, mask=mask)
        tl.debug_barrier()  # all threads have stored before one draws the ticket
        is_last = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == split - 1
    if is_last:
        if spread:
            value = _add_parts(partials, size, at, mask, block_m, block_n, split)
            if gated:
                up = _add_parts(up_partials, size, at, mask, block_m, block_n, split)
            tl.store(tickets + tile, 0)
        _finish(value, up, bias, residual, out, row, first_column, column, mask, out_features, residual_stride, gated)


class Workspace:
    """What launches that split K share on a device: room for the parts' sums, and a counter of tickets per tile.

    It grows when a weight is packed, never in a call. A captured graph may hold what it was before, so that is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(0, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(0, dtype=torch.int32, device=device)
        self._outgrown: list[Tensor] = []

    def reserve(self, partials: int, tickets: int) -> None:
        """Make room for so many floats and counters."""
        if partials > self.partials.numel():
            self._outgrown.append(self.partials)
            self.partials = self.partials.new_empty(partials)
        if tickets > self.tickets.numel():
            self._outgrown.append(self.tickets)
            self.tickets = self.tickets.new_zeros(tickets)


workspace = functools.cache(Workspace)
"""A device's one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration made ready for one weight. `programs`: to each tile of rows."""

    tile_rows: int
    programs: int
    constants: dict[str, Any]
    warps: int
    stages: int
    room: Workspace | None
    """Where K is spread over programs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a weight is multiplied: by bucket of rows (None is cuBLAS), and in exact steps: each choice of `exact` serves
    all rows above those of the one before it, up to its own number."""

    in_features: int
    out_features: int
    choices: tuple[Choice | None, ...]
    exact: tuple[tuple[int, Choice], ...]

    def choice(self, num_rows: int, exact: bool) -> Choice | None:
        if exact:
            return next(choice for most_rows, choice in self.exact if num_rows <= most_rows)
        return self.choices[candidates.bucket_index(num_rows)]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [out_features, in_features] as it came, its bias, and its plans alone and with a residual."""

    weight: Tensor
    bias: Tensor | None
    plain: Plan
    added: Plan

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class PackedGate:
    """A merged gate and up projection [2 * out_features, in_features], the gate first."""

    weight: Tensor
    bias: Tensor | None
    plan: Plan

    @property
    def out_features(self) -> int:
        return self.weight.shape[0] // 2


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, table: Table | None = None) -> PackedLinear:
    """See kernels.ops.linear. Chooses by `table`, the device's own if None; keeps the weight itself where it can.

    Raises ValueError where weight and bias do not belong together, or for a dtype that is none of the three floats.
    """
    weight = _settled(weight, bias)
    plain, added = (make_plan(_described(op, weight), weight.device, table) for op in ("linear", "linear_add"))
    return PackedLinear(weight, bias, plain, added)


def pack_gated(weight: Tensor, bias: Tensor | None = None, *, table: Table | None = None) -> PackedGate:
    weight = _settled(weight, bias)
    if weight.shape[0] % 2:
        raise ValueError(f"a gated weight has two halves, not {weight.shape[0]} rows")
    return PackedGate(weight, bias, make_plan(_described("gated_linear", weight), weight.device, table))


def linear(x: Tensor, packed: PackedLinear, *, exact: bool = False) -> Tensor:
    """See kernels.ops.linear; the rows of `x` may lie apart."""
    return _compute(x, packed, None, packed.plain, exact)


def linear_add(x: Tensor, packed: PackedLinear, residual: Tensor, *, exact: bool = False) -> Tensor:
    if residual.shape != (x.shape[0], packed.out_features) or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(f"residual {_told(residual)} for a result ({x.shape[0]}, {packed.out_features}) of {x.dtype}")
    return _compute(x, packed, residual, packed.added, exact)


def gated_linear(x: Tensor, packed: PackedGate, *, exact: bool = False) -> Tensor:
    return _compute(x, packed, None, packed.plan, exact)


def _compute(x: Tensor, packed: PackedLinear | PackedGate, residual: Tensor | None, plan: Plan, exact: bool) -> Tensor:
    shape, stride, weight = x.shape, x.stride(), packed.weight
    if len(shape) != 2 or shape[1] != plan.in_features or stride[1] != 1 or x.dtype != weight.dtype:
        raise ValueError(f"x {_told(x)} for a weight {_told(weight)}: rows must be contiguous, of its width and dtype")
    num_rows = shape[0]
    if num_rows == 0:
        return x.new_empty((0, plan.out_features))
    choice = plan.choice(num_rows, exact)
    if choice is None:
        return _by_library(x, weight, packed.bias, residual, gated=isinstance(packed, PackedGate))
    return _by_kernel(choice, x, weight, packed.bias, residual)


def _by_kernel(choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    num_rows, constants, room = x.shape[0], choice.constants, choice.room
    out = x.new_empty((num_rows, constants["out_features"]))
    if num_rows > 1:
        constants = _with_strides(constants, x, residual)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "out": out,
        "partials": None if room is None else room.partials,
        "tickets": None if room is None else room.tickets,
        "num_rows": num_rows,
        "num_parts": constants["split"],
    }
    grid = (-(-num_rows // choice.tile_rows) * choice.programs,)
    launch(_linear_kernel, grid, arguments, constants, num_warps=choice.warps, num_stages=choice.stages)
    return out


def _with_strides(constants: dict[str, Any], x: Tensor, residual: Tensor | None) -> dict[str, Any]:
    """`constants`, with the strides of rows that lie apart."""
    x_stride = x.stride(0)
    residual_stride = constants["out_features"] if residual is None else residual.stride(0)
    if x_stride == constants["x_stride"] and residual_stride == constants["residual_stride"]:
        return constants
    return {**constants, "x_stride": x_stride, "residual_stride": residual_stride}


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, gated: bool) -> Tensor:
    """By cuBLAS, and what must follow it."""
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.t())
    y = F.linear(x, weight, bias)
    if gated:
        return silu_and_mul(y)
    return y if residual is None else y.add_(residual)


def make_plan(weight: Weight, device: torch.device, table: Table | None = None) -> Plan:
    """The choices for a weight: measured ones, and the stated defaults for buckets without."""
    table = table or _table_of(device)
    measured = table.choices(weight) if table else {}
    shared_bytes = _shared_bytes(device)

    def choose(bucket: int) -> Choice | None:
        known = bucket in measured
        config = measured[bucket] if known else candidates.default(weight, bucket, shared_bytes)
        return None if config is None else make_choice(weight, config, bucket, device)

    measured_or_default = tuple(choose(bucket) for bucket in BUCKETS)
    exact = _exact_choices(weight, shared_bytes, device)
    return Plan(weight.in_features, weight.out_features, measured_or_default, exact)


def _exact_choices(weight: Weight, shared_bytes: int, device: torch.device) -> tuple[tuple[int, Choice], ...]:
    """Large tiles on Hopper only, where their bits were compared: before it their sums do not fit into registers, and
    Blackwell multiplies otherwise."""
    small, large = candidates.exact(weight, shared_bytes), candidates.exact_large(weight)
    spread, serial = (
        make_choice(weight, small, SPREAD_ROWS, device),
        make_choice(weight, small, 0, device, spread=False),
    )
    if large is None or weight.dtype == "float32" or not 90 <= capability(device) < 100:
        return ((SPREAD_ROWS, spread), (ANY_ROWS, serial))
    column_tiles = -(-weight.out_features // large.tile_columns)
    choices = [(SPREAD_ROWS, spread)]
    if -(-SPREAD_ROWS // large.tile_rows) * column_tiles * large.split >= FEW_PROGRAMS:
        choices = [(SMALL_ROWS, spread), (SPREAD_ROWS, make_choice(weight, large, SPREAD_ROWS, device))]
    few_rows = large.tile_rows * (-(-FEW_PROGRAMS // column_tiles) - 1)
    if few_rows > SPREAD_ROWS:
        choices.append((few_rows, serial))
    return (*choices, (ANY_ROWS, make_choice(weight, large, 0, device, spread=False)))


def exact_row_counts(plan: Plan) -> list[int]:
    """Numbers of rows that together take every configuration of exact steps."""
    return [min(rows, 1 + SPREAD_ROWS + sum(r for r, _ in plan.exact if r < ANY_ROWS)) for rows, _ in plan.exact]


def make_choice(weight: Weight, config: Config, max_rows: int, device: torch.device, *, spread: bool = True) -> Choice:
    """A configuration ready for up to `max_rows`. `spread`: each part of K has its own program, else one does all."""
    spread = spread and config.split > 1
    column_tiles = -(-weight.out_features // config.tile_columns)
    room = workspace(device) if spread else None
    if room is not None:
        tiles = -(-max_rows // config.tile_rows) * column_tiles
        room.reserve(candidates.partial_bytes(weight, max_rows, config.split) // 4, tiles)
    constants = {
        "in_features": weight.in_features,
        "out_features": weight.out_features,
        "x_stride": weight.in_features,
        "residual_stride": weight.out_features,
        "gated": weight.halves == 2,
        "swapped": config.swapped,
        "block_m": config.tile_rows,
        "block_n": config.tile_columns,
        "block_k": config.tile_depth,
        "split": config.split,
        "spread": spread,
        "group": GROUP_TILES,
    }
    programs = column_tiles * (config.split if spread else 1)
    return Choice(config.tile_rows, programs, constants, config.warps, config.stages, room)


def prepare(
    weight: Weight, config: Config | None, num_rows: int, device: torch.device, *, exact: bool = False
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """For the tuner: what computes (x, weight, residual) of `num_rows` by a configuration, or by cuBLAS if None; with
    `exact` by the configuration of exact steps."""
    if config is None and not exact:
        return lambda x, w, residual: _by_library(x, w, None, residual, gated=weight.halves == 2)
    if exact:
        choices = _exact_choices(weight, _shared_bytes(device), device)
        choice = next(choice for most_rows, choice in choices if num_rows <= most_rows)
    else:
        assert config is not None
        choice = make_choice(weight, config, num_rows, device)
    return lambda x, w, residual: _by_kernel(choice, x, w, None, residual)


def here(device: torch.device) -> Device:
    """A CUDA device as tables know it."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Device(name, capability, triton.__version__, str(torch.__version__))


def _table_of(device: torch.device) -> Table | None:
    return TABLES.of(here(device)) if device.type == "cuda" else None


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return candidates.SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _settled(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight as the kernel reads it: rows one after the other, from an address that vectors can be read from."""
    name = str(weight.dtype).removeprefix("torch.")
    if weight.dim() != 2 or name not in candidates.ITEM_BYTES:
        raise ValueError(f"weight {_told(weight)}: a matrix of {', '.join(candidates.ITEM_BYTES)} is needed")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.stride(0) != 1):
        raise ValueError(f"bias {_told(bias)} for a weight {_told(weight)}")
    weight = weight.contiguous()
    return weight if weight.is_meta or weight.data_ptr() % ALIGNMENT == 0 else weight.clone()


def _described(op: str, weight: Tensor) -> Weight:
    halves = 2 if op == "gated_linear" else 1
    return Weight(op, weight.shape[0] // halves, weight.shape[1], str(weight.dtype).removeprefix("torch."))


def _told(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}"
