"""Top-k, top-p and min-p as one number per row, its limit, without sorting the vocabulary.

The order of the specification, highest scaled logit first and lowest id among equals, is that of an int64 *rank*: the
bits of |scaled logit|, then the id. What the filters keep are the ranks up to a limit, which is searched for so
(Floyd and Rivest, 1975, select with a sample):

1. `_bracket_kernel` (a program per row) guesses from a sample of the row two ranks between which the limit lies.
2. `_collect_kernel` (a program per chunk of a row) reads the row once; it collects the ranks within the bracket and
   adds up what lies before it. Places in the collection are given out by an atomic counter, so their order varies.
3. `_limit_kernel` (a program per row) searches the collection. Where the guess was wrong, or too much was collected,
   it searches the row itself, about a hundred readings of it: such rows are rare and exact too.

Probability masses are exp(scaled) in float64, rounded to 42 fractional bits: sums of integers do not depend on their
order. So a limit is a function of its row alone, to the bit; it differs from the specification's where a sum of
probabilities comes within 1e-10 of top_p.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch, next_power_of_2

CHUNK = 2048
"""Logits of a program."""
CHUNK_WARPS = 8
LIMIT_WARPS = 16
CAPACITY = 8192
"""Ranks that the last step holds in registers."""
SEGMENT = 32
"""Neighbours that a sample takes together: 128 bytes."""
MIN_SAMPLE, MAX_SAMPLE = 2048, 16384
LOGITS_PER_SAMPLED = 20
SAMPLED_PER_WARP = 256
DEVIATIONS = 4
"""Half a bracket's width: so many standard deviations of the place of a sample's median,"""
CAPACITY_USED = 0.86
"""or what fills this part of a collection, for the number of logits between two sampled ones varies too."""
MAX_VOCAB_SIZE = 2**20
"""Beyond it a sum of masses would pass 2**62."""

ALL = tl.constexpr(0x7F800000)
"""The key of -inf, the last of all."""
NO_ID = tl.constexpr(2**31 - 1)
MASS_OF_BEST = tl.constexpr(2.0**42)
TOLERANCE = tl.constexpr(4)
"""Sampled ranks by which a guess may miss its place."""
TALLIES = tl.constexpr(4)
"""Per row: ranks collected, ranks before the bracket, their mass, the row's mass."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a row of logits is cut up. Follows from the model alone."""

    vocab_size: int
    stride: int
    chunk: int
    sample: int
    """0 where the whole row fits into a collection."""
    window: float
    """Half a bracket's width, in sampled logits."""

    @property
    def chunks(self) -> int:
        return cdiv(self.vocab_size, self.chunk)

    @property
    def id_bits(self) -> int:
        return max(self.vocab_size - 1, 1).bit_length()

    @property
    def row(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "stride": self.stride}


def layout_of(logits: Tensor) -> Layout:
    """Raises ValueError for logits that the kernels cannot read."""
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits must be [rows, vocab] in float32 or bfloat16: {tuple(logits.shape)} {logits.dtype}")
    vocab_size = logits.shape[1]
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary has 1 to {MAX_VOCAB_SIZE} ids, not {vocab_size}")
    if vocab_size > 1 and logits.stride(1) != 1:
        raise ValueError(f"a row of logits must be contiguous, strides are {logits.stride()}")
    sample, window = 0, 0.0
    if vocab_size > CAPACITY:
        wanted = next_power_of_2(cdiv(vocab_size, LOGITS_PER_SAMPLED))
        sample = min(max(wanted, MIN_SAMPLE), MAX_SAMPLE)
        window = min(DEVIATIONS * sample**0.5 / 2, CAPACITY_USED / 2 * CAPACITY * sample / vocab_size)
    return Layout(vocab_size, logits.stride(0), CHUNK, sample, window)


def check_vector(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype) -> None:
    if tensor is not None and (tensor.shape != (size,) or tensor.dtype != dtype or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be {dtype} [{size}], contiguous, not {tensor.dtype} {tuple(tensor.shape)}")


@dataclass(frozen=True, slots=True)
class Parameters:
    """How each row samples; `temperature` None stands for 1, the rest None for rows that filter nothing."""

    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @property
    def arguments(self) -> dict[str, Tensor | None]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


@triton.jit
def temperature_of(row, temperature) -> tl.tensor:
    if temperature is None:
        return 1.0
    else:
        return tl.load(temperature + row)


@triton.jit
def wants_top_k(row, top_k, vocab_size: tl.constexpr) -> tl.tensor:
    """k, or 0 where all are kept."""
    k = tl.load(top_k + row)
    return tl.where((k > 0) & (k < vocab_size), k, 0)


@triton.jit
def is_filtered(row, temperature, top_k, top_p, min_p, vocab_size: tl.constexpr) -> tl.tensor:
    """Whether the row samples, and not from its whole vocabulary."""
    if top_k is None:
        return False
    else:
        asks = (wants_top_k(row, top_k, vocab_size) > 0) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)
        return asks & (temperature_of(row, temperature) > 0)


@triton.jit
def is_number(x) -> tl.tensor:
    return tl.abs(x) < float("inf")


@triton.jit
def load_logits(logits, row, ids, vocab_size: tl.constexpr, stride: tl.constexpr) -> tl.tensor:
    """float32; -inf beyond the vocabulary, +inf for a NaN, so that the highest shows that its row is broken."""
    x = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def scale(x, highest, temperature) -> tl.tensor:
    """The specification's scaled logits, to the bit."""
    return tl.div_rn(x - highest, temperature)


@triton.jit
def rank_of(scaled, ids, id_bits: tl.constexpr) -> tl.tensor:
    return (tl.abs(scaled).to(tl.int32, bitcast=True).to(tl.int64) << id_bits) | ids


@triton.jit
def is_upto(scaled, ids, limit, id_bits: tl.constexpr) -> tl.tensor:
    """rank_of(scaled, ids) <= limit, in 32 bits."""
    key, last_key = tl.abs(scaled).to(tl.int32, bitcast=True), (limit >> id_bits).to(tl.int32)
    return (key < last_key) | ((key == last_key) & (ids <= (limit & ((1 << id_bits) - 1)).to(tl.int32)))


@triton.jit
def _last_rank(id_bits: tl.constexpr):
    return (tl.full((), ALL, tl.int64) << id_bits) | ((1 << id_bits) - 1)


@triton.jit
def mass_of(scaled) -> tl.tensor:
    return (tl.exp(scaled.to(tl.float64)) * MASS_OF_BEST + 0.5).to(tl.int64)


@triton.jit
def _place_of_tail(scaled, ids, tail, id_bits: tl.constexpr, sample: tl.constexpr):
    """About how many of the sampled logits come before those at the end that have the mass `tail` together."""
    low, high = tl.full((), -1, tl.int64), _last_rank(id_bits)
    before, upto = 0, sample
    while (high - low > 1) & (upto - before > TOLERANCE):
        middle = low + (high - low) // 2
        inside = is_upto(scaled, ids, middle, id_bits)
        count = tl.sum(inside.to(tl.int32), 0)
        if tl.sum(tl.where(inside, 0.0, tl.exp(scaled)), 0) > tail:
            low = middle
            before = count
        else:
            high = middle
            upto = count
    return upto.to(tl.float32)


@triton.jit
def _near(scaled, ids, place, id_bits: tl.constexpr, sample: tl.constexpr):
    """A rank with about `place` of the sampled logits up to it; -1, or the last of all, where there is none."""
    low, high = tl.full((), -1, tl.int64), _last_rank(id_bits)
    found = tl.where(place >= sample, high, low)
    missing = tl.where((place > 0) & (place < sample), 1.0 * sample, 0.0)
    while (high - low > 1) & (missing > TOLERANCE):
        found = low + (high - low) // 2
        count = tl.sum(is_upto(scaled, ids, found, id_bits).to(tl.int32), 0).to(tl.float32)
        missing = tl.abs(count - place)
        if count < place:
            low = found
        else:
            high = found
    return found


@triton.jit
def _guess(
    logits, row, highest, temperature, k, top_p, total,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr,
    sample: tl.constexpr, segment: tl.constexpr, window: tl.constexpr,
):  # fmt: skip
    """(first, last): the limit is probably in (first, last]. `total` is the row's mass."""
    lane = tl.arange(0, sample)
    ids = lane // segment * (vocab_size // (sample // segment)) + lane % segment
    scaled = scale(load_logits(logits, row, ids, vocab_size, stride), highest, temperature)
    share = sample / vocab_size
    place = k.to(tl.float32) * share
    margin = tl.minimum(6.0 * tl.sqrt(place) + 16.0, window)
    if k == 0:
        place = _place_of_tail(scaled, ids, (1.0 - top_p) * total * share, id_bits, sample)
        margin = 1.0 * window
    first = tl.full((), -1, tl.int64)
    if (k == 0) | (top_p >= 1):
        first = _near(scaled, ids, place - margin, id_bits, sample)
    return first, _near(scaled, ids, tl.maximum(place + margin, 1.0), id_bits, sample)


@triton.jit
def _bracket_kernel(
    logits, temperature, top_k, top_p, min_p, chunk_highest, chunk_mass, highest, brackets, tallies,
    vocab_size: tl.constexpr, stride: tl.constexpr, chunks: tl.constexpr, chunks_block: tl.constexpr,
    id_bits: tl.constexpr, sample: tl.constexpr, segment: tl.constexpr, window: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if is_filtered(row, temperature, top_k, top_p, min_p, vocab_size):
        chunk = tl.arange(0, chunks_block)
        tops = tl.load(chunk_highest + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
        top = tl.max(tops, 0)
        tl.store(highest + row, top)
        tl.store(tallies + row * TALLIES + tl.arange(0, TALLIES), tl.zeros((TALLIES,), tl.int64))
        k, p = wants_top_k(row, top_k, vocab_size), tl.load(top_p + row)
        first, last = tl.full((), -1, tl.int64), _last_rank(id_bits)
        if sample > 0 and ((k > 0) | (p < 1)) & is_number(top):
            warmth = temperature_of(row, temperature)
            masses = tl.load(chunk_mass + row * chunks + chunk, mask=chunk < chunks, other=0.0)
            total = tl.sum(masses * tl.exp((tops - top) / warmth), 0)
            first, last = _guess(
                logits, row, top, warmth, k, p, total, vocab_size, stride, id_bits, sample, segment, window
            )
        tl.store(brackets + row * 2, first)
        tl.store(brackets + row * 2 + 1, last)


@triton.jit
def _collect_kernel(
    logits, temperature, top_k, top_p, min_p, chunk_highest, highest, brackets, tallies, collected,
    vocab_size: tl.constexpr, stride: tl.constexpr, chunks: tl.constexpr, id_bits: tl.constexpr,
    capacity: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    asks = is_filtered(row, temperature, top_k, top_p, min_p, vocab_size)  # loads in flight together, here and below
    top, chunk_top = tl.load(highest + row), tl.load(chunk_highest + row * chunks + chunk)
    first, last = tl.load(brackets + row * 2), tl.load(brackets + row * 2 + 1)
    k, p, warmth = wants_top_k(row, top_k, vocab_size), tl.load(top_p + row), temperature_of(row, temperature)
    if asks:
        whole = (k == 0) & (p < 1)
        reaches = (k > 0) & is_upto(scale(chunk_top, top, warmth), 0, last, id_bits)
        if is_number(top) & (whole | reaches):
            ids = chunk * block + tl.arange(0, block)
            scaled = scale(load_logits(logits, row, ids, vocab_size, stride), top, warmth)
            before = is_upto(scaled, ids, first, id_bits) & (ids < vocab_size)
            inside = (is_upto(scaled, ids, last, id_bits) & (ids < vocab_size) & ~before).to(tl.int32)
            found = tl.sum(inside, 0)
            if found > 0:
                place = tl.atomic_add(tallies + row * TALLIES, found.to(tl.int64), sem="relaxed").to(tl.int32)
                place += tl.cumsum(inside, 0) - 1
                ranks = rank_of(scaled, ids, id_bits)
                tl.store(collected + row * capacity + place, ranks, mask=(inside > 0) & (place < capacity))
            if first >= 0:
                tl.atomic_add(tallies + row * TALLIES + 1, tl.sum(before.to(tl.int32), 0).to(tl.int64), sem="relaxed")
            if whole:
                masses = mass_of(scaled)
                tl.atomic_add(tallies + row * TALLIES + 2, tl.sum(tl.where(before, masses, 0), 0), sem="relaxed")
                tl.atomic_add(tallies + row * TALLIES + 3, tl.sum(masses, 0), sem="relaxed")


@triton.jit
def _tally(
    limit, given, source, by_mass: tl.constexpr,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """How many ids there are up to `limit`, or their mass, int64: among those `given` (scaled logits, ids, masses), or
    where there are none, in the row that is the `source` (logits, row, highest, temperature)."""
    if given is None:
        total = tl.zeros((block,), tl.int64)
        for start in range(0, vocab_size, block):
            ids = start + tl.arange(0, block)
            scaled = scale(load_logits(source[0], source[1], ids, vocab_size, stride), source[2], source[3])
            inside = is_upto(scaled, ids, limit, id_bits) & (ids < vocab_size)
            total += tl.where(inside, mass_of(scaled) if by_mass else 1, 0)
    elif by_mass:
        total = tl.where(is_upto(given[0], given[1], limit, id_bits), given[2], 0)
    else:
        total = is_upto(given[0], given[1], limit, id_bits).to(tl.int32)
    return tl.sum(total, 0).to(tl.int64)


@triton.jit
def _reach(
    goal, first, last, given, source, by_mass: tl.constexpr,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The limit in (first, last] whose tally reaches `goal`: by count at the end of a key, by mass at an id."""
    all_ids = tl.full((), (1 << id_bits) - 1, tl.int64)
    low, high = (first >> id_bits) - 1, last >> id_bits
    while high - low > 1:
        middle = low + (high - low) // 2
        limit = (middle << id_bits) | all_ids
        if _tally(limit, given, source, by_mass, vocab_size, stride, id_bits, block) >= goal:
            high = middle
        else:
            low = middle
    limit = (high << id_bits) | all_ids
    if by_mass:
        reached = _tally(limit, given, source, by_mass, vocab_size, stride, id_bits, block)
        limit = tl.minimum(limit, last)
        if reached - goal >= mass_of(_scaled_of(high)):  # not all of its equals belong to it
            low_limit, limit = (high << id_bits) - 1, (high << id_bits) | all_ids
            while limit - low_limit > 1:
                middle = low_limit + (limit - low_limit) // 2
                if _tally(middle, given, source, by_mass, vocab_size, stride, id_bits, block) >= goal:
                    limit = middle
                else:
                    low_limit = middle
    return limit


@triton.jit
def _scaled_of(key):
    return -key.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _goal(top_p, total):
    """The mass that a nucleus reaches."""
    return tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _limit_among(
    k, top_p, first, last, tallies, collected, row,
    vocab_size: tl.constexpr, id_bits: tl.constexpr, capacity: tl.constexpr,
):  # fmt: skip
    """(limit, whether it is right): from the ranks collected."""
    found, before = tl.load(tallies + row * TALLIES), tl.load(tallies + row * TALLIES + 1)
    mass_before, total = tl.load(tallies + row * TALLIES + 2), tl.load(tallies + row * TALLIES + 3)
    place = tl.arange(0, capacity)
    ranks = tl.load(collected + row * capacity + place, mask=place < found, other=0)
    scaled = tl.where(place < found, _scaled_of(ranks >> id_bits), float("-inf"))
    ids = tl.where(place < found, ranks & ((1 << id_bits) - 1), NO_ID).to(tl.int32)
    given = (scaled, ids, mass_of(scaled))
    right, limit = found <= capacity, last
    if k > 0:
        right = right & (before < k) & (k <= before + found)
        limit = _reach(tl.maximum(k - before, 1), first, last, given, None, False, vocab_size, 0, id_bits, 0)
    if top_p < 1:
        inside = _tally(limit, given, None, True, vocab_size, 0, id_bits, 0)
        if k > 0:
            right = right & (first < 0) & ((limit < last) | (found == vocab_size))
            total = inside
        goal = _goal(top_p, total) - mass_before
        right = right & (goal <= inside) & ((goal > 0) | (first < 0))
        limit = _reach(tl.maximum(goal, 1), first, limit, given, None, True, vocab_size, 0, id_bits, 0)
    return limit, right


@triton.jit
def _limit_in(
    k, top_p, source, vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, block: tl.constexpr
):
    """The limit, from the row itself."""
    first, limit = tl.full((), -1, tl.int64), _last_rank(id_bits)
    if k > 0:
        limit = _reach(k, first, limit, None, source, False, vocab_size, stride, id_bits, block)
    if top_p < 1:
        goal = _goal(top_p, _tally(limit, None, source, True, vocab_size, stride, id_bits, block))
        limit = _reach(tl.maximum(goal, 1), first, limit, None, source, True, vocab_size, stride, id_bits, block)
    return limit


@triton.jit
def _limit_of_min_p(min_p, id_bits: tl.constexpr):
    """The last rank of the last key with exp(-key) >= min_p, in float64."""
    floor = min_p.to(tl.float64)
    about = tl.abs(tl.log(floor))
    low = (about * (1.0 - 2.0**-22)).to(tl.float32).to(tl.int32, bitcast=True) - 1
    high = (about * (1.0 + 2.0**-22) + 1.2e-16).to(tl.float32).to(tl.int32, bitcast=True) + 1
    low = tl.where(floor > 1, -1, low)
    high = tl.where(floor > 1, 0, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.exp(-middle.to(tl.float32, bitcast=True).to(tl.float64)) >= floor:
            low = middle
        else:
            high = middle
    return (low.to(tl.int64) << id_bits) | ((1 << id_bits) - 1)


@triton.jit
def _limit_kernel(
    logits, temperature, top_k, top_p, min_p, highest, brackets, tallies, collected, limits,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, capacity: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if is_filtered(row, temperature, top_k, top_p, min_p, vocab_size):
        top, warmth = tl.load(highest + row), temperature_of(row, temperature)
        k, p, floor = wants_top_k(row, top_k, vocab_size), tl.load(top_p + row), tl.load(min_p + row)
        limit = _last_rank(id_bits)
        if is_number(top) & ((k > 0) | (p < 1)):
            first, last = tl.load(brackets + row * 2), tl.load(brackets + row * 2 + 1)
            limit, right = _limit_among(k, p, first, last, tallies, collected, row, vocab_size, id_bits, capacity)
            if not right:
                limit = _limit_in(k, p, (logits, row, top, warmth), vocab_size, stride, id_bits, block)
        if floor > 0:
            limit = tl.minimum(limit, _limit_of_min_p(floor, id_bits))
        tl.store(limits + row, limit)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the rows that filter; the entries of the others are undefined."""

    highest: Tensor
    """float32 [rows]: each row's highest logit."""
    limits: Tensor
    """int64 [rows]: the last rank that is kept."""


def find_limits(
    logits: Tensor, layout: Layout, parameters: Parameters, chunk_highest: Tensor, chunk_mass: Tensor
) -> Limits:
    """`chunk_highest` and `chunk_mass` (float32 [rows, chunks]): of each chunk the highest logit, and the sum of
    exp((logit - highest) / temperature), where the row asks for top-p."""
    rows, device, int64 = len(logits), logits.device, torch.int64
    highest = torch.empty(rows, dtype=torch.float32, device=device)
    limits = torch.empty(rows, dtype=int64, device=device)
    brackets = torch.empty((rows, 2), dtype=int64, device=device)
    tallies = torch.empty((rows, TALLIES.value), dtype=int64, device=device)
    collected = torch.empty((rows, CAPACITY), dtype=int64, device=device)
    arguments = {"logits": logits, **parameters.arguments, "highest": highest, "brackets": brackets, "tallies": tallies}
    constants = layout.row | {"id_bits": layout.id_bits}
    launch(
        _bracket_kernel,
        (rows,),
        arguments | {"chunk_highest": chunk_highest, "chunk_mass": chunk_mass},
        constants
        | {"chunks": layout.chunks, "chunks_block": next_power_of_2(layout.chunks), "sample": layout.sample}
        | {"segment": SEGMENT, "window": layout.window},
        num_warps=min(max(layout.sample // SAMPLED_PER_WARP, 4), 32),
    )
    launch(
        _collect_kernel,
        (rows * layout.chunks,),
        arguments | {"chunk_highest": chunk_highest, "collected": collected},
        constants | {"chunks": layout.chunks, "capacity": CAPACITY, "block": layout.chunk},
        num_warps=CHUNK_WARPS,
    )
    launch(
        _limit_kernel,
        (rows,),
        arguments | {"collected": collected, "limits": limits},
        constants | {"capacity": CAPACITY, "block": layout.chunk},
        num_warps=LIMIT_WARPS,
    )
    return Limits(highest, limits)
