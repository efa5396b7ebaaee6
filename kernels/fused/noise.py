"""The counter-based noise of kernels.reference.sampling, in wrapping uint32, and the Gumbel values made of it.

Two forms of the same Gumbel value. `exact_gumbel` is the specification's, in float64: with c = 1 - v, which float64
holds exactly, it is -ln(-ln c), rounded once to float32. NVIDIA states an error of at most 1 ulp for its float64
logarithm: with both logarithms off by as much, either way, 1 of 2 * 10^7 values moved, by one ulp of float32. A token
then differs only where two scores are that close. `near_gumbel` costs two fast float32 logarithms, is off by less than
2e-5, and only finds the few ids that the exact form decides between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch

GOLDEN = tl.constexpr(0x9E3779B9)
FIRST_KEY = tl.constexpr(0x243F6A88)
SECOND_KEY = tl.constexpr(0x85A308D3)
FIRST_FACTOR = tl.constexpr(0x7FEB352D)
SECOND_FACTOR = tl.constexpr(0x846CA68B)

BLOCK = 1024
"""Elements of a program of the kernels below, which no step needs: a step makes its noise where it samples."""


@triton.jit
def mix(x) -> tl.tensor:
    """lowbias32 of uint32."""
    x = tl.mul(x ^ (x >> 16), FIRST_FACTOR, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), SECOND_FACTOR, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def bits_of(token_ids, first, second) -> tl.tensor:
    """uint32 noise of `token_ids` (integers) under a row's two keys (uint32)."""
    x = mix(token_ids.to(tl.uint32)) ^ first
    x = tl.mul(x ^ (x >> 16), FIRST_FACTOR, sanitize_overflow=False)
    x = tl.add(x, second, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), SECOND_FACTOR, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def exact_gumbel(bits) -> tl.tensor:
    complement = ((bits ^ 0xFFFFFFFF).to(tl.float64) + 0.5) * 2.0**-32
    return -tl.log(-tl.log(complement)).to(tl.float32)


@triton.jit
def near_gumbel(bits) -> tl.tensor:
    v = (bits.to(tl.float32) + 0.5) * 2.0**-32
    complement = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))  # -ln(1 - v), where 1 - v would lose v's digits
    return -tl.log(tl.where(v < 0.0625, series, -tl.log(complement)))


@triton.jit
def keys_of(keys, row) -> tuple[tl.tensor, tl.tensor]:
    """A row's two keys as uint32."""
    return tl.load(keys + row * 2).to(tl.uint32), tl.load(keys + row * 2 + 1).to(tl.uint32)


@triton.jit(do_not_specialize=["num_rows"])
def _noise_keys_kernel(seeds, sample_indices, positions, out, num_rows, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = row < num_rows
    seed = tl.load(seeds + row, mask=mask, other=0)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    sample_index = tl.load(sample_indices + row, mask=mask, other=0).to(tl.uint32)
    position = tl.load(positions + row, mask=mask, other=0).to(tl.uint32)
    for chain in tl.static_range(2):
        state = tl.full((block,), FIRST_KEY if chain == 0 else SECOND_KEY, tl.uint32)
        state = mix(tl.add(state, GOLDEN, sanitize_overflow=False) ^ low)
        state = mix(tl.add(state, GOLDEN, sanitize_overflow=False) ^ high)
        state = mix(tl.add(state, GOLDEN, sanitize_overflow=False) ^ sample_index)
        state = mix(tl.add(state, GOLDEN, sanitize_overflow=False) ^ position)
        tl.store(out + row * 2 + chain, state.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_ids"])
def _noise_kernel(keys, token_ids, out, num_ids, gumbel: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < num_ids
    first, second = keys_of(keys, row)
    bits = bits_of(tl.load(token_ids + column, mask=mask, other=0), first, second)
    values = exact_gumbel(bits) if gumbel else bits.to(tl.int64)
    tl.store(out + row * num_ids + column, values, mask=mask)


def noise_keys(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    """See kernels.ops.sampling."""
    for name, tensor in (("seeds", seeds), ("sample_indices", sample_indices), ("positions", positions)):
        if tensor.shape != seeds.shape or tensor.ndim != 1 or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [rows], not {tensor.dtype} {tuple(tensor.shape)}")
    out = torch.empty((len(seeds), 2), dtype=torch.int64, device=seeds.device)
    arguments = {"seeds": seeds, "sample_indices": sample_indices, "positions": positions, "out": out}
    block = 128
    grid = (cdiv(len(seeds), block),)
    launch(_noise_keys_kernel, grid, arguments | {"num_rows": len(seeds)}, {"block": block})
    return out


def noise_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    return _noise(keys, token_ids, torch.int64)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    return _noise(keys, token_ids, torch.float32)


def check_keys(keys: Tensor, num_rows: int) -> None:
    if keys.shape != (num_rows, 2) or keys.dtype != torch.int64 or not keys.is_contiguous():
        raise ValueError(f"keys must be int64 [{num_rows}, 2], contiguous, not {keys.dtype} {tuple(keys.shape)}")


def _noise(keys: Tensor, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    check_keys(keys, len(keys))
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [ids], not {token_ids.dtype} {tuple(token_ids.shape)}")
    out = torch.empty((len(keys), len(token_ids)), dtype=dtype, device=keys.device)
    launch(
        _noise_kernel,
        (len(keys), cdiv(len(token_ids), BLOCK)),
        {"keys": keys, "token_ids": token_ids, "out": out, "num_ids": len(token_ids)},
        {"gumbel": dtype == torch.float32, "block": BLOCK},
    )
    return out
