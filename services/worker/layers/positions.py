"""Rotary positions: every scaling that transformers 5 knows, as a function of the position alone.

Formulas are those of transformers' `modeling_rope_utils`. There, `dynamic` and `longrope` choose their frequencies by
the longest position of the forward pass, so a token's key depends on how its prompt was cut; here they depend on the
token's own position, which is what transformers computes when it is fed token by token. ops/decisions says more.
"""

import math
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
    """A factor per frequency, one list within the trained length and one beyond (Ding et al., 2024)."""

    theta: float
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    trained_positions: int
    attention_factor: float


class Llama3Rope(msgspec.Struct, frozen=True, tag="llama3"):
    """Long wavelengths divided by a factor, short ones kept, a smooth passage between (Llama 3.1)."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    trained_positions: int


Rope: TypeAlias = DefaultRope | LinearRope | DynamicRope | YarnRope | LongRope | Llama3Rope

TABLE_POSITIONS = 2048
"""A table grows by this many positions at a time, so a position's entry never depends on who asked first."""


class RopeTable:
    """cos and sin by position, both halves of a head alike, grown as positions are asked for."""

    def __init__(self, rope: Rope, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._rope, self._head_dim, self._dtype, self._device = rope, head_dim, dtype, device
        self._cos = torch.empty(0, head_dim, dtype=dtype, device=device)
        self._sin = torch.empty(0, head_dim, dtype=dtype, device=device)

    def gather(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [tokens, head_dim], for positions below `end`."""
        self.reserve(end)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def reserve(self, end: int) -> None:
        """Makes entries for positions below `end`. Captured graphs hold the tables, which must not grow behind them."""
        while self._cos.shape[0] < end:
            self._grow()

    def _grow(self) -> None:
        first = self._cos.shape[0]
        positions = torch.arange(first, first + TABLE_POSITIONS)
        angles = positions[:, None].float() * inverse_frequencies(self._rope, self._head_dim, positions)
        angles = torch.cat((angles, angles), dim=-1)
        factor = attention_factor(self._rope)
        cos, sin = (angles.cos() * factor).to(self._dtype), (angles.sin() * factor).to(self._dtype)
        self._cos = torch.cat((self._cos, cos.to(self._device)))
        self._sin = torch.cat((self._sin, sin.to(self._device)))


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied with."""
    return rope.attention_factor if isinstance(rope, YarnRope | LongRope) else 1.0


def inverse_frequencies(rope: Rope, head_dim: int, positions: Tensor) -> Tensor:
    """Angular frequencies in float32, [positions or 1, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if isinstance(rope, DynamicRope):
        return _dynamic_frequencies(rope, head_dim, exponents, positions)
    if isinstance(rope, LongRope):
        return _long_frequencies(rope, exponents, positions)
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


def _long_frequencies(rope: LongRope, exponents: Tensor, positions: Tensor) -> Tensor:
    is_long = (positions >= rope.trained_positions)[:, None]
    factors = torch.where(is_long, torch.tensor(rope.long_factor), torch.tensor(rope.short_factor))
    return 1.0 / (factors * rope.theta**exponents)


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
