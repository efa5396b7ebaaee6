"""Positions: rotary with every scaling that transformers 5 knows, ALiBi, learned and sinusoidal ones.

All are functions of the position alone.

Formulas are those of transformers' `modeling_rope_utils`. There, `dynamic` and `longrope` choose their frequencies by
the longest position of the forward pass, so a token's key depends on how its prompt was cut. Here those of `dynamic`
depend on the token's own position, which is what transformers computes when it is fed token by token, and those of
`longrope` on the longest context that is served. ops/decisions says more.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor


class DefaultRope(msgspec.Struct, frozen=True, tag="default"):
    """θ⁻²ⁱᐟᵈ (Su et al., 2021)."""

    theta: float


class LinearRope(msgspec.Struct, frozen=True, tag="linear"):
    """Positions divided by a factor (Chen et al., 2023)."""

    theta: float
    factor: float


class DynamicRope(msgspec.Struct, frozen=True, tag="dynamic"):
    """θ grows with the position beyond the trained length (NTK-aware scaling)."""

    theta: float
    factor: float
    trained_positions: int


class YarnRope(msgspec.Struct, frozen=True, tag="yarn"):
    """Interpolation by wavelength between two ramps (Peng et al., 2023)."""

    theta: float
    factor: float
    trained_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class LongRope(msgspec.Struct, frozen=True, tag="longrope"):
    """A factor per frequency (Ding et al., 2024): the short ones or, `stretched` to contexts beyond the trained length,
    the long ones, at every position."""

    theta: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    trained_positions: int
    attention_factor: float
    stretched: bool = False


class Llama3Rope(msgspec.Struct, frozen=True, tag="llama3"):
    """Long wavelengths divided by a factor, short ones kept, a smooth passage between (Llama 3.1)."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_positions: int


Rope: TypeAlias = DefaultRope | LinearRope | DynamicRope | YarnRope | LongRope | Llama3Rope


class Rotary(msgspec.Struct, frozen=True, tag="rotary"):
    """Rope on the first `dim` elements of each head, a scaling per layer (None: in that layer only the causal mask
    tells positions apart). Pairs are halves apart, or side by side where `interleaved` (GPT-J)."""

    ropes: tuple[Rope | None, ...]
    dim: int
    interleaved: bool = False


class Alibi(msgspec.Struct, frozen=True, tag="alibi"):
    """A slope per head, times the distance of key and query, is taken off the scores (Press et al., 2021)."""

    slopes: tuple[float, ...]


class Learned(msgspec.Struct, frozen=True, tag="learned"):
    """A row per position, the first `offset` of `rows` unused, is added to the embeddings."""

    rows: int
    offset: int = 0


class Sinusoidal(msgspec.Struct, frozen=True, tag="sinusoidal"):
    """sin and cos of the position (Vaswani et al., 2017), counted from `offset`, are added to the embeddings: first the
    sines, then the cosines, as tensor2tensor lays them."""

    offset: int = 0


Turns: TypeAlias = dict[Rope | None, tuple[Tensor, Tensor] | tuple[None, None]]
"""By rope: cos and sin of a step's tokens, [tokens, rotary_dim]."""

TABLE_POSITIONS = 2048
"""A table grows by this many positions at a time, so a position's entry never depends on who asked first."""


class GrowingTable:
    """A row per position, computed as it is asked for. `rows` gives those of int64 positions [n]: [n, width]."""

    def __init__(self, rows: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
        self._rows, self._dtype, self._device = rows, dtype, device
        self._table = rows(torch.arange(0)).to(device, dtype)

    def gather(self, positions: Tensor, end: int) -> Tensor:
        """[tokens, width], for positions below `end`."""
        self.reserve(end)
        return self._table.index_select(0, positions)

    def reserve(self, end: int) -> None:
        """Makes rows for positions below `end`. Captured graphs hold the table, which must not grow behind them."""
        while (first := self._table.shape[0]) < end:
            more = self._rows(torch.arange(first, first + TABLE_POSITIONS)).to(self._dtype)
            self._table = torch.cat((self._table, more.to(self._device)))


class RopeTable:
    """cos and sin by position, both halves of a head alike."""

    def __init__(self, rope: Rope, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        factor = attention_factor(rope)

        def angles(positions: Tensor) -> Tensor:
            once = positions[:, None].float() * inverse_frequencies(rope, dim, positions)
            return torch.cat((once, once), dim=-1)

        self._cos = GrowingTable(lambda positions: angles(positions).cos() * factor, dtype, device)
        self._sin = GrowingTable(lambda positions: angles(positions).sin() * factor, dtype, device)

    def gather(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [tokens, dim], for positions below `end`."""
        return self._cos.gather(positions, end), self._sin.gather(positions, end)

    def reserve(self, end: int) -> None:
        self._cos.reserve(end)
        self._sin.reserve(end)


class Places:
    """What a decoder makes of its tokens' positions before the first layer: turns for the layers that turn heads, and
    rows that are added to the embeddings. `learned` [rows, hidden_size] for positions that are."""

    def __init__(
        self,
        positions: "Rotary | Alibi | Learned | Sinusoidal",
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        learned: Tensor | None = None,
    ) -> None:
        ropes = dict.fromkeys(positions.ropes) if isinstance(positions, Rotary) else {}
        dim = positions.dim if isinstance(positions, Rotary) else 0
        self._ropes = {rope: RopeTable(rope, dim, dtype, device) for rope in ropes if rope is not None}
        self._learned = learned
        self._offset = positions.offset if isinstance(positions, Learned | Sinusoidal) else 0
        self._waves = None
        if isinstance(positions, Sinusoidal):
            self._waves = GrowingTable(lambda places: sinusoids(places, hidden_size), dtype, device)

    def turns(self, positions: Tensor, end: int) -> Turns:
        """For positions [tokens] int64 below `end`."""
        return {None: (None, None), **{rope: table.gather(positions, end) for rope, table in self._ropes.items()}}

    def rows(self, positions: Tensor, end: int) -> Tensor | None:
        """[tokens, hidden_size] to add to the embeddings, if any."""
        if self._learned is not None:
            return self._learned.index_select(0, positions + self._offset)
        return None if self._waves is None else self._waves.gather(positions + self._offset, end + self._offset)

    def reserve(self, end: int) -> None:
        for table in self._ropes.values():
            table.reserve(end)
        if self._waves is not None:
            self._waves.reserve(end + self._offset)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """float32 [positions, width]: sines of 10000^(-i / (width / 2 - 1)) times the position, then cosines."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * (-math.log(10_000.0) / (half - 1)))
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def alibi_slopes(num_heads: int, largest: float = 8.0) -> tuple[float, ...]:
    """2^(-8 i / n) for n heads, n a power of two; else those of the power below, then every other one of the power
    above (Press et al., 2021, and their code). `largest` takes the place of the 8 (MPT)."""
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-largest * (i + 1) / below) for i in range(below)]
    more = [2.0 ** (-largest * (2 * i + 1) / (2 * below)) for i in range(num_heads - below)]
    return tuple(slopes + more)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied with."""
    return rope.attention_factor if isinstance(rope, YarnRope | LongRope) else 1.0


def inverse_frequencies(rope: Rope, head_dim: int, positions: Tensor) -> Tensor:
    """Angular frequencies in float32, [positions or 1, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if isinstance(rope, DynamicRope):
        return _dynamic_frequencies(rope, head_dim, exponents, positions)
    if isinstance(rope, LongRope):
        factors = torch.tensor(rope.long_factor if rope.stretched else rope.short_factor)
        return (1.0 / (factors * rope.theta**exponents))[None]
    frequencies = 1.0 / (rope.theta**exponents)
    if isinstance(rope, LinearRope):
        frequencies = frequencies / rope.factor
    elif isinstance(rope, YarnRope):
        frequencies = _yarn_frequencies(rope, head_dim, exponents)
    elif isinstance(rope, Llama3Rope):
        frequencies = _llama3_frequencies(rope, frequencies)
    return frequencies[None]


def _dynamic_frequencies(rope: DynamicRope, head_dim: int, exponents: Tensor, positions: Tensor) -> Tensor:
    lengths = (positions + 1).clamp_min(rope.trained_positions)
    stretch = rope.factor * lengths / rope.trained_positions - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / (theta[:, None] ** exponents)


def _yarn_frequencies(rope: YarnRope, head_dim: int, exponents: Tensor) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """The dimension that turns so many times within the trained length."""
        turns = math.log(rope.trained_positions / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    wavelengths = rope.theta**exponents
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _llama3_frequencies(rope: Llama3Rope, frequencies: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = rope.trained_positions / rope.low_freq_factor, rope.trained_positions / rope.high_freq_factor
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (rope.trained_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(is_between, between, scaled)
