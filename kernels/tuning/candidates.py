"""The declared configurations of a product with a constant weight, and the choice where no table was measured.

A product of up to 64 rows reads its weight once and is bound by memory: its tiles are narrow, many are in flight, and
K is split so that all multiprocessors read. From there on it is bound by the tensor cores, whose favourite tiles are
large. On Hopper a tile of 16 rows is multiplied with the weight as the left factor (`swapped`), for wgmma wants 64 rows
there and takes 16 columns on the right.
"""

import hashlib

import msgspec

OPS = ("linear", "linear_add", "gated_linear")
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of rows that are measured; each serves all from above the one before it. The last serves any more."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARED_BYTES = 163 * 1024
"""Shared memory that a block may ask for where no device says otherwise: an A100's, the least of our targets."""
REVISION = 1
"""To be raised when the kernel changes so much that measured tables no longer speak of it."""


class Weight(msgspec.Struct, frozen=True):
    """A weight and what is computed with it.

    `out_features` counts the columns of the result: a gated weight, gate above up, has twice as many rows.
    """

    op: str
    out_features: int
    in_features: int
    dtype: str = "bfloat16"

    @property
    def halves(self) -> int:
        return 2 if self.op == "gated_linear" else 1

    @property
    def bytes(self) -> int:
        return self.halves * self.out_features * self.in_features * ITEM_BYTES[self.dtype]


class Config(msgspec.Struct, frozen=True):
    """How the kernel of kernels/fused/linear.py computes a product; None in its place means cuBLAS.

    A program makes `tile_rows` by `tile_columns` of the result (of both halves, where gated), walking K in steps of
    `tile_depth`. K is cut into `split` parts, whose sums are added in order.
    """

    tile_rows: int
    tile_columns: int
    tile_depth: int
    warps: int
    stages: int
    split: int = 1
    swapped: bool = False

    def __str__(self) -> str:
        tile = f"{self.tile_rows}x{self.tile_columns}x{self.tile_depth}"
        return f"{tile}{' swapped' if self.swapped else ''} split {self.split} warps {self.warps} stages {self.stages}"


Tile = tuple[int, int, int, int]
"""tile_columns, tile_depth, warps, stages"""
SWAPPED_TILES: dict[int, tuple[Tile, ...]] = {
    1: ((64, 64, 4, 8), (64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3), (256, 64, 8, 4)),
    2: ((64, 64, 4, 5), (64, 128, 4, 3), (128, 64, 8, 4)),
}
"""By halves of the weight; for up to 64 rows, in tiles of 16, 32 or 64."""
TILES: dict[int, dict[int, tuple[Tile, ...]]] = {
    1: {
        16: ((64, 128, 4, 5), (128, 64, 4, 5)),
        32: ((64, 128, 4, 5), (128, 64, 4, 5)),
        64: ((64, 128, 4, 4), (128, 64, 4, 4), (256, 64, 8, 4)),
        128: ((64, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3)),
    },
    2: {
        64: ((64, 64, 4, 4), (128, 64, 8, 4)),
        128: ((64, 64, 8, 4), (128, 64, 8, 3)),
    },
}
"""By halves and rows of the tile."""
SPLITS = (1, 2, 4, 8, 16)
PROGRAMS = (96, 1100)
"""Fewest and most programs of a launch that is split: an H200 has 132 multiprocessors, an A100 108, a B200 148."""
MIN_STEPS = 4
"""Steps of K in a part: fewer are over before the pipeline is full."""
MAX_PARTIAL_BYTES = 64 * 2**20
MAX_SPLIT_TILE = 128 * 128
"""Elements (of both halves) of the largest candidate whose K is split: adding the parts of a larger one spills."""
SKINNY_ROWS = 64

EXACT_TILES = {1: (64, 128, 64, 4, 4), 2: (64, 64, 64, 4, 4)}
EXACT_FLOAT32 = (32, 32, 32, 4, 2)
"""tile_rows, tile_columns, tile_depth, warps, stages of exact steps, by halves."""
EXACT_LARGE_TILES = {1: (256, 128, 64, 8, 3), 2: (128, 128, 64, 8, 3)}
EXACT_LARGE_SPLIT = (128, 256, 64, 8, 3)
"""The same for many rows; where K is cut into parts."""
EXACT_PROGRAMS = 120
DEFAULT_TILES = {1: (64, 128, 4, 5), 2: (64, 64, 4, 5)}
DEFAULT_PROGRAMS = 240


def bucket_index(num_rows: int) -> int:
    """Which of BUCKETS serves `num_rows`, 1 or more."""
    return min((num_rows - 1).bit_length(), len(BUCKETS) - 1)


def candidates(weight: Weight, bucket: int, shared_bytes: int = SHARED_BYTES) -> list[Config]:
    """What is measured beside cuBLAS for this weight at this number of rows; float32 is left to cuBLAS."""
    if weight.dtype == "float32":
        return []
    tiles = [config for config in _tiles(weight.halves, bucket) if shared_need(weight, config) <= shared_bytes]
    return [split for config in tiles for split in _splits(weight, bucket, config)]


def all_candidates(weight: Weight, shared_bytes: int = SHARED_BYTES) -> list[Config]:
    """Those of all buckets, each once: what the tuner compiles."""
    return list(dict.fromkeys(one for bucket in BUCKETS for one in candidates(weight, bucket, shared_bytes)))


def extremes(weight: Weight, shared_bytes: int = SHARED_BYTES) -> list[Config]:
    """Of each tile the least and the most split candidate: what compiles between them needs no more."""
    by_tile: dict[Config, list[Config]] = {}
    for config in all_candidates(weight, shared_bytes):
        by_tile.setdefault(msgspec.structs.replace(config, split=1), []).append(config)
    ends = ((min(of, key=_split_of), max(of, key=_split_of)) for of in by_tile.values())
    return list(dict.fromkeys(config for pair in ends for config in pair))


def _split_of(config: Config) -> int:
    return config.split


def _tiles(halves: int, bucket: int) -> list[Config]:
    found = []
    if bucket <= SKINNY_ROWS:
        rows = max(16, bucket)
        found += [Config(rows, *tile, swapped=True) for tile in SWAPPED_TILES[halves]]
    for rows, tiles in TILES[halves].items():
        fitting = rows == max(16, bucket) if bucket <= SKINNY_ROWS else rows >= SKINNY_ROWS
        found += [Config(rows, *tile) for tile in tiles if fitting]
    return found


def _splits(weight: Weight, bucket: int, config: Config) -> list[Config]:
    """`config` in as many parts as fill a device; the last bucket has no bound and is never split."""
    tiles = -(-bucket // config.tile_rows) * -(-weight.out_features // config.tile_columns)
    steps = -(-weight.in_features // config.tile_depth)
    least, most = PROGRAMS
    found = []
    size = config.tile_rows * config.tile_columns * weight.halves
    can_split = bucket < BUCKETS[-1] and size <= MAX_SPLIT_TILE
    for split in SPLITS if can_split else (1,):
        fits = steps >= split * MIN_STEPS and partial_bytes(weight, bucket, split) <= MAX_PARTIAL_BYTES
        if split == 1 or (fits and tiles * split <= most):
            found.append(msgspec.structs.replace(config, split=split))
    enough = [config for config in found if tiles * config.split >= least]
    return enough or found[-3:]


def default(weight: Weight, bucket: int, shared_bytes: int = SHARED_BYTES) -> Config | None:
    """The choice without a table: unmeasured, made of what is known of such kernels; None is cuBLAS."""
    if weight.dtype == "float32" or bucket > SKINNY_ROWS:
        return None
    if bucket > 16:
        return exact(weight, shared_bytes)
    return _filled(weight, Config(16, *DEFAULT_TILES[weight.halves], swapped=True), DEFAULT_PROGRAMS, shared_bytes)


def exact(weight: Weight, shared_bytes: int = SHARED_BYTES) -> Config:
    """The configuration of exact steps, whatever the number of rows but for the size of the tile (`exact_large`).

    It follows from the weight alone, never from a table, so workers on other devices compute the same bits as far as
    their tensor cores do. The number of stages, which a small shared memory may lower, changes no bit.
    """
    tile = EXACT_FLOAT32 if weight.dtype == "float32" else EXACT_TILES[weight.halves]
    return _filled(weight, Config(*tile), EXACT_PROGRAMS, shared_bytes)


def exact_large(weight: Weight) -> Config | None:
    """The same in a larger tile, for many rows of 16 bits; None for a gated weight whose K is cut. Depth and parts are
    those of `exact`, so each sum is made of the same steps of K in the same order, and has the same bits: on an H200 at
    every shape that was tried."""
    split = exact(weight).split
    if split > 1 and weight.halves > 1:
        return None
    return Config(*(EXACT_LARGE_SPLIT if split > 1 else EXACT_LARGE_TILES[weight.halves]), split)


def _filled(weight: Weight, config: Config, programs: int, shared_bytes: int) -> Config:
    """`config` in the fewest parts that give so many programs, in stages that fit."""
    tiles, steps = -(-weight.out_features // config.tile_columns), -(-weight.in_features // config.tile_depth)
    splits = [split for split in SPLITS[:4] if split == 1 or steps >= split * MIN_STEPS]
    split = next((split for split in splits if tiles * split >= programs), splits[-1])
    stages = min(config.stages, max(2, shared_bytes // (shared_need(weight, config) // config.stages)))
    return msgspec.structs.replace(config, split=split, stages=stages)


def shared_need(weight: Weight, config: Config) -> int:
    """Bytes of shared memory that the tiles in flight take."""
    lines = config.tile_rows + weight.halves * config.tile_columns
    return config.stages * lines * config.tile_depth * ITEM_BYTES[weight.dtype]


def partial_bytes(weight: Weight, num_rows: int, split: int) -> int:
    """Bytes of float32 that `split` parts leave behind before they are added."""
    return 4 * split * num_rows * weight.halves * weight.out_features if split > 1 else 0


def space_hash() -> str:
    """What a table is measured over. Another hash: other configurations or rules, so its choices mean nothing here."""
    samples = [Weight(op, n, k) for op in OPS for n, k in ((1024, 1024), (4096, 14336), (128_256, 4096))]
    ruled = [[str(one) for one in candidates(weight, bucket)] for weight in samples for bucket in BUCKETS]
    space = (REVISION, BUCKETS, SWAPPED_TILES, TILES, ruled)
    return hashlib.sha256(repr(space).encode()).hexdigest()[:16]
