"""Sampling on the device: from logits to tokens without a host. kernels.ops.sampling has the contracts.

A row's vocabulary is cut into chunks, one program each, so that one row alone keeps many multiprocessors busy; the cut
follows from the vocabulary's size only. A call starts a fixed sequence of fixed grids, whatever the rows ask for:

1. `_scan_kernel`: each chunk's highest logit. For a row that samples from its whole vocabulary, also the chunk's
   nominees: the ids whose score (scaled logit + noise), known here up to 2e-5, is within `SLACK` of the best.
2. Rows that filter: their limits (filters.py), then `_nominate_kernel`, the nominees among what the limit keeps.
3. `_choose_kernel` (a program per row): the exact scores of the nominees, in the specification's arithmetic, and the
   highest of them; or the highest logit for greedy rows.

So greedy and plain rows read their logits once and filtered rows three times. A chunk offers up to `NOMINEES` ids, and
a fifth within `SLACK` of the best is a matter of 1 in 10^12 chunks; it would have to be the best by less than 2e-5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.filters import (
    CHUNK_WARPS,
    NO_ID,
    Layout,
    Limits,
    Parameters,
    check_vector,
    find_limits,
    is_filtered,
    is_number,
    is_upto,
    layout_of,
    load_logits,
    scale,
    temperature_of,
)
from kernels.fused.launch import cdiv, launch, next_power_of_2
from kernels.fused.logprobs import token_logprobs
from kernels.fused.noise import bits_of, check_keys, exact_gumbel, gumbel, keys_of, near_gumbel, noise_bits, noise_keys

__all__ = [
    "add_bias", "best", "forbid", "gumbel", "keep", "noise_bits", "noise_keys", "penalize", "restrict", "sample",
    "token_logprobs",
]  # fmt: skip

SLACK = tl.constexpr(1e-3)
NOMINEES = 4
ENTRIES = 256
"""Entries of a program that changes logits."""
RESTRICTED = 2048
"""Tokens that a program of `restrict` looks at."""


@triton.jit
def _nominate(
    scaled, row, chunk, first, second, nominees, counts,
    chunks: tl.constexpr, num_nominees: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Stores the ids of a chunk that may have the highest score; `scaled` is -inf where an id is out of question."""
    lane = tl.arange(0, block)
    scores = scaled + near_gumbel(bits_of(chunk * block + lane, first, second))
    best, at = tl.max(scores, 0, return_indices=True)
    floor = best - SLACK
    count = 0
    while (count < num_nominees) & (best >= floor) & is_number(best):
        tl.store(nominees + (row * chunks + chunk) * num_nominees + count, chunk * block + at)
        scores = tl.where(lane == at, float("-inf"), scores)
        best, at = tl.max(scores, 0, return_indices=True)
        count += 1
    tl.store(counts + row * chunks + chunk, count)


@triton.jit
def _scan_kernel(
    logits, keys, temperature, top_k, top_p, min_p, highest, highest_ids, mass, nominees, counts,
    vocab_size: tl.constexpr, stride: tl.constexpr, chunks: tl.constexpr, num_nominees: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    x = load_logits(logits, row, chunk * block + tl.arange(0, block), vocab_size, stride)
    if keys is not None:  # on their way before anything waits
        first, second = keys_of(keys, row)
    warmth, filtered = temperature_of(row, temperature), is_filtered(row, temperature, top_k, top_p, min_p, vocab_size)
    top, at = tl.max(x, 0, return_indices=True)
    tl.store(highest + row * chunks + chunk, top)
    tl.store(highest_ids + row * chunks + chunk, chunk * block + at)
    draws = is_number(top) & (warmth > 0)
    inverse = tl.minimum(1.0 / tl.where(warmth > 0, warmth, 1.0), 3e38)
    if mass is not None:
        total = 0.0
        if draws & filtered:
            total = tl.sum(tl.exp((x - top) * inverse), 0)
        tl.store(mass + row * chunks + chunk, total)
    if keys is not None:
        if draws & (filtered == 0):
            _nominate((x - top) * inverse, row, chunk, first, second, nominees, counts, chunks, num_nominees, block)
        else:
            tl.store(counts + row * chunks + chunk, 0)


@triton.jit
def _nominate_kernel(
    logits, keys, temperature, top_k, top_p, min_p, chunk_highest, highest, limits, nominees, counts,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, chunks: tl.constexpr,
    num_nominees: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    asks = is_filtered(row, temperature, top_k, top_p, min_p, vocab_size)
    top, chunk_top = tl.load(highest + row), tl.load(chunk_highest + row * chunks + chunk)
    warmth, limit = temperature_of(row, temperature), tl.load(limits + row)
    first, second = keys_of(keys, row)
    if asks:
        if is_number(top) & is_number(chunk_top) & is_upto(scale(chunk_top, top, warmth), 0, limit, id_bits):
            ids = chunk * block + tl.arange(0, block)
            scaled = scale(load_logits(logits, row, ids, vocab_size, stride), top, warmth)
            scaled = tl.where(is_upto(scaled, ids, limit, id_bits), scaled, float("-inf"))
            _nominate(scaled, row, chunk, first, second, nominees, counts, chunks, num_nominees, block)
        else:
            tl.store(counts + row * chunks + chunk, 0)


@triton.jit
def _choose_kernel(
    logits, keys, temperature, highest, highest_ids, nominees, counts, token_ids, values,
    stride: tl.constexpr, chunks: tl.constexpr, chunks_block: tl.constexpr, num_nominees: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, chunks_block)
    at = row * chunks + chunk
    tops = tl.load(highest + at, mask=chunk < chunks, other=float("-inf"))
    top = tl.max(tops, 0)
    token_id = tl.min(tl.where(tops == top, tl.load(highest_ids + at, mask=chunk < chunks, other=NO_ID), NO_ID), 0)
    if keys is not None:
        warmth = temperature_of(row, temperature)
        if is_number(top) & (warmth > 0):
            place = tl.arange(0, chunks_block * num_nominees)
            of = place // num_nominees
            offered = tl.load(counts + row * chunks + of, mask=of < chunks, other=0) > place % num_nominees
            ids = tl.load(nominees + row * chunks * num_nominees + place, mask=offered, other=0)
            x = tl.load(logits + row * stride + ids, mask=offered, other=float("-inf")).to(tl.float32)
            first, second = keys_of(keys, row)
            scores = scale(x, top, warmth) + exact_gumbel(bits_of(ids, first, second))
            best = tl.max(scores, 0)
            token_id = tl.min(tl.where(offered & (scores == best), ids, NO_ID), 0)
    # A row of NaNs has no best id, nor one of which min-p above 1 keeps nothing; the next step may look it up unseen.
    token_id = tl.where(token_id == NO_ID, 0, token_id)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(values + row, top)


@triton.jit
def _keep_kernel(
    logits, temperature, top_k, top_p, min_p, highest, limits, kept,
    vocab_size: tl.constexpr, stride: tl.constexpr, id_bits: tl.constexpr, chunks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    ids = chunk * block + tl.arange(0, block)
    marked = ids < vocab_size
    if is_filtered(row, temperature, top_k, top_p, min_p, vocab_size):
        x = load_logits(logits, row, ids, vocab_size, stride)
        scaled = scale(x, tl.load(highest + row), 1.0)
        marked = is_upto(scaled, ids, tl.load(limits + row), id_bits)
    tl.store(kept + row * vocab_size + ids, marked, mask=ids < vocab_size)


@triton.jit(do_not_specialize=["num_entries"])
def _penalize_kernel(
    logits, rows, token_ids, output_counts, repetition, presence, frequency, num_entries,
    stride: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = entry < num_entries
    row, token_id = tl.load(rows + entry, mask=mask, other=-1), tl.load(token_ids + entry, mask=mask, other=0)
    mask = mask & (row >= 0)
    at = logits + row * stride + token_id
    x = tl.load(at, mask=mask, other=0.0)
    factor = tl.load(repetition + entry, mask=mask, other=1.0)
    count = tl.load(output_counts + entry, mask=mask, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x -= tl.load(frequency + entry, mask=mask, other=0.0) * count
    x -= tl.load(presence + entry, mask=mask, other=0.0) * (count > 0).to(tl.float32)
    tl.store(at, x, mask=mask)


@triton.jit(do_not_specialize=["num_entries"])
def _change_kernel(logits, rows, token_ids, bias, num_entries, stride: tl.constexpr, block: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = entry < num_entries
    row, token_id = tl.load(rows + entry, mask=mask, other=-1), tl.load(token_ids + entry, mask=mask, other=0)
    mask = mask & (row >= 0)
    at = logits + row * stride + token_id
    if bias is None:
        tl.store(at, tl.full((block,), float("-inf"), tl.float32), mask=mask)
    else:
        x = tl.load(at, mask=mask, other=0.0) + tl.load(bias + entry, mask=mask, other=0.0)
        tl.store(at, x, mask=mask)


@triton.jit
def _restrict_kernel(
    logits, rows, allowed,
    vocab_size: tl.constexpr, stride: tl.constexpr, words: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    entry, part = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    ids = part * block + tl.arange(0, block)
    word = tl.load(allowed + entry * words + ids // 32, mask=ids < vocab_size, other=0)
    left_out = ((word >> (ids % 32)) & 1) == 0
    at = logits + tl.load(rows + entry) * stride + ids
    tl.store(at, tl.full((block,), float("-inf"), tl.float32), mask=left_out & (ids < vocab_size))


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See kernels.ops.sampling, here and below. Reads the logits once."""
    layout = layout_of(logits)
    chunks = _Chunks(logits, layout)
    _scan(logits, None, layout, Parameters(None, None, None, None), chunks)
    return _choose(logits, None, None, layout, chunks)


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    layout = layout_of(logits)
    check_keys(keys, len(logits))
    parameters = _parameters(len(logits), temperature, top_k, top_p, min_p)
    chunks = _Chunks(logits, layout, draws=True, filters=top_k is not None)
    _scan(logits, keys, layout, parameters, chunks)
    if chunks.mass is not None:
        limits = find_limits(logits, layout, parameters, chunks.highest, chunks.mass)
        _nominate_kept(logits, keys, layout, parameters, chunks, limits)
    return _choose(logits, keys, temperature, layout, chunks)


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    layout = layout_of(scaled)
    parameters = _parameters(len(scaled), None, top_k, top_p, min_p)
    chunks = _Chunks(scaled, layout, filters=True)
    _scan(scaled, None, layout, parameters, chunks)
    assert chunks.mass is not None
    limits = find_limits(scaled, layout, parameters, chunks.highest, chunks.mass)
    kept = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    launch(
        _keep_kernel,
        (len(scaled) * layout.chunks,),
        {"logits": scaled, **parameters.arguments, "highest": limits.highest, "limits": limits.limits, "kept": kept},
        layout.row | {"id_bits": layout.id_bits, "chunks": layout.chunks, "block": layout.chunk},
        num_warps=CHUNK_WARPS,
    )
    return kept


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """An entry whose row is -1 is left out: a captured graph's list has a fixed length. So in the next two."""
    _check_entries(logits, rows, token_ids, output_counts, repetition, presence, frequency)
    factors = {"repetition": repetition, "presence": presence, "frequency": frequency}
    launch(
        _penalize_kernel,
        (cdiv(len(rows), ENTRIES),),
        {"logits": logits, "rows": rows, "token_ids": token_ids, "output_counts": output_counts, **factors}
        | {"num_entries": len(rows)},
        {"stride": logits.stride(0), "block": ENTRIES},
    )


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    _check_entries(logits, rows, token_ids, bias)
    _change(logits, rows, token_ids, bias)


def forbid(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    _check_entries(logits, rows, token_ids)
    _change(logits, rows, token_ids, None)


def restrict(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    _check_entries(logits, rows, rows)
    vocab_size = logits.shape[1]
    words = cdiv(vocab_size, 32)
    if allowed.shape != (len(rows), words) or allowed.dtype != torch.int32 or not allowed.is_contiguous():
        raise ValueError(f"allowed must be int32 [{len(rows)}, {words}] and contiguous, not {tuple(allowed.shape)}")
    blocks = cdiv(vocab_size, RESTRICTED)
    launch(
        _restrict_kernel,
        (len(rows) * blocks,),
        {"logits": logits, "rows": rows, "allowed": allowed},
        {"vocab_size": vocab_size, "stride": logits.stride(0), "words": words, "blocks": blocks, "block": RESTRICTED},
    )


def _change(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    launch(
        _change_kernel,
        (cdiv(len(rows), ENTRIES),),
        {"logits": logits, "rows": rows, "token_ids": token_ids, "bias": bias, "num_entries": len(rows)},
        {"stride": logits.stride(0), "block": ENTRIES},
    )


class _Chunks:
    """What programs of one row's chunks tell each other. All [rows, chunks]."""

    def __init__(self, logits: Tensor, layout: Layout, *, draws: bool = False, filters: bool = False) -> None:
        shape, device = (len(logits), layout.chunks), logits.device
        self.highest = torch.empty(shape, dtype=torch.float32, device=device)
        self.highest_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.mass = torch.empty_like(self.highest) if filters else None
        self.counts = torch.empty_like(self.highest_ids) if draws else None
        self.nominees = torch.empty((*shape, NOMINEES), dtype=torch.int32, device=device) if draws else None


def _scan(logits: Tensor, keys: Tensor | None, layout: Layout, parameters: Parameters, chunks: _Chunks) -> None:
    arguments = {"logits": logits, "keys": keys, **parameters.arguments}
    found = {"highest": chunks.highest, "highest_ids": chunks.highest_ids, "mass": chunks.mass}
    launch(
        _scan_kernel,
        (len(logits) * layout.chunks,),
        arguments | found | {"nominees": chunks.nominees, "counts": chunks.counts},
        layout.row | {"chunks": layout.chunks, "num_nominees": NOMINEES, "block": layout.chunk},
        num_warps=CHUNK_WARPS,
    )


def _nominate_kept(
    logits: Tensor, keys: Tensor, layout: Layout, parameters: Parameters, chunks: _Chunks, limits: Limits
) -> None:
    known = {"chunk_highest": chunks.highest, "highest": limits.highest, "limits": limits.limits}
    launch(
        _nominate_kernel,
        (len(logits) * layout.chunks,),
        {"logits": logits, "keys": keys, **parameters.arguments, **known}
        | {"nominees": chunks.nominees, "counts": chunks.counts},
        layout.row
        | {"id_bits": layout.id_bits, "chunks": layout.chunks, "num_nominees": NOMINEES, "block": layout.chunk},
        num_warps=CHUNK_WARPS,
    )


def _choose(
    logits: Tensor, keys: Tensor | None, temperature: Tensor | None, layout: Layout, chunks: _Chunks
) -> tuple[Tensor, Tensor]:
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    values = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    found = {"highest": chunks.highest, "highest_ids": chunks.highest_ids}
    launch(
        _choose_kernel,
        (len(logits),),
        {"logits": logits, "keys": keys, "temperature": temperature, **found}
        | {"nominees": chunks.nominees, "counts": chunks.counts, "token_ids": token_ids, "values": values},
        {"stride": layout.stride, "chunks": layout.chunks, "chunks_block": next_power_of_2(layout.chunks)}
        | {"num_nominees": NOMINEES},
    )
    return token_ids, values


def _parameters(
    rows: int, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Parameters:
    filters = {"top_k": (top_k, torch.int64), "top_p": (top_p, torch.float32), "min_p": (min_p, torch.float32)}
    given = [tensor is not None for tensor, _ in filters.values()]
    if any(given) != all(given):
        raise ValueError("top_k, top_p and min_p are given together or not at all")
    for name, (tensor, dtype) in {"temperature": (temperature, torch.float32), **filters}.items():
        check_vector(name, tensor, rows, dtype)
    return Parameters(temperature, top_k, top_p, min_p)


def _check_entries(logits: Tensor, rows: Tensor, token_ids: Tensor, *values: Tensor) -> None:
    layout_of(logits)
    if logits.dtype != torch.float32:
        raise ValueError(f"logits that are changed must be float32, not {logits.dtype}")
    for name, tensor, dtype in (
        ("rows", rows, torch.int64),
        ("token_ids", token_ids, torch.int64),
        *(("an entry's value", tensor, torch.float32) for tensor in values),
    ):
        check_vector(name, tensor, len(rows), dtype)
