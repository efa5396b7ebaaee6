"""Logprobs of chosen tokens and of the most likely ones. kernels.ops.sampling has the contract.

A chunk's probabilities are summed as integers of 42 fractional bits (filters.py), the chunks in float64 in a fixed
order: logprobs are right to the last bit or so of float32. The most likely ids come out of two merges: each chunk gives
its best in order, and a program per row takes the best of the chunks' next ones, again and again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.filters import CHUNK_WARPS, MASS_OF_BEST, check_vector, layout_of, load_logits, mass_of
from kernels.fused.launch import launch, next_power_of_2

TAKEN = tl.constexpr(-(2**63))


@triton.jit
def _place_of(x, ids):
    """int64 that is higher for a higher logit, and for a lower id among equals."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit(do_not_specialize=["num_top"])
def _describe_kernel(
    logits, token_ids, highest, sums, above, best, num_top,
    vocab_size: tl.constexpr, stride: tl.constexpr, chunks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    ids = chunk * block + tl.arange(0, block)
    x = load_logits(logits, row, ids, vocab_size, stride)
    top = tl.max(x, 0)
    at = row * chunks + chunk
    tl.store(highest + at, top)
    base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    tl.store(sums + at, tl.sum(mass_of(x - base), 0))
    chosen = tl.load(logits + row * stride + tl.load(token_ids + row)).to(tl.float32)
    tl.store(above + at, tl.sum((x > chosen).to(tl.int32), 0))
    places = tl.where(ids < vocab_size, _place_of(x, ids), TAKEN)
    for i in range(num_top):
        place = tl.max(places, 0)
        tl.store(best + at * num_top + i, place)
        places = tl.where(places == place, TAKEN, places)


@triton.jit(do_not_specialize=["num_top"])
def _logprobs_kernel(
    logits, token_ids, highest, sums, above, best, logprobs, ranks, top_ids, top_logprobs, num_top,
    stride: tl.constexpr, chunks: tl.constexpr, chunks_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, chunks_block)
    mask = chunk < chunks
    at = row * chunks + chunk
    tops = tl.load(highest + at, mask=mask, other=float("-inf"))
    top = tl.max(tops, 0)
    shifts = tl.where(tl.abs(tops) < float("inf"), tops - top, float("-inf")).to(tl.float64)
    masses = tl.load(sums + at, mask=mask, other=0).to(tl.float64) / MASS_OF_BEST
    log_sum = tl.log(tl.sum(masses * tl.exp(shifts), 0))
    chosen = tl.load(logits + row * stride + tl.load(token_ids + row)).to(tl.float64)
    tl.store(logprobs + row, (chosen - top - log_sum).to(tl.float32))
    tl.store(ranks + row, 1 + tl.sum(tl.load(above + at, mask=mask, other=0), 0).to(tl.int64))
    taken = tl.zeros((chunks_block,), tl.int32)
    heads = tl.load(best + at * num_top, mask=mask & (num_top > 0), other=TAKEN)
    for i in range(num_top):
        head = tl.max(heads, 0)
        token_id = 0x7FFFFFFF - (head & 0x7FFFFFFF)
        tl.store(top_ids + row * num_top + i, token_id)
        x = tl.load(logits + row * stride + token_id).to(tl.float64)
        tl.store(top_logprobs + row * num_top + i, (x - top - log_sum).to(tl.float32))
        here = heads == head
        taken += here.to(tl.int32)
        following = tl.load(best + at * num_top + taken, mask=mask & here & (taken < num_top), other=TAKEN)
        heads = tl.where(here, following, heads)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See kernels.ops.sampling. Reads the logits once."""
    layout = layout_of(logits)
    rows, device = len(logits), logits.device
    check_vector("token_ids", token_ids, rows, torch.int64)
    if not 0 <= num_top <= layout.vocab_size:
        raise ValueError(f"num_top is {num_top}, the vocabulary has {layout.vocab_size} ids")
    shape = (rows, layout.chunks)
    chunks = {
        "highest": torch.empty(shape, dtype=torch.float32, device=device),
        "sums": torch.empty(shape, dtype=torch.int64, device=device),
        "above": torch.empty(shape, dtype=torch.int32, device=device),
        "best": torch.empty((*shape, num_top), dtype=torch.int64, device=device),
    }
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int64, device=device)
    top_ids = torch.empty((rows, num_top), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((rows, num_top), dtype=torch.float32, device=device)
    found = {"logprobs": logprobs, "ranks": ranks, "top_ids": top_ids, "top_logprobs": top_logprobs}
    arguments = {"logits": logits, "token_ids": token_ids, "num_top": num_top, **chunks}
    constants = {"stride": layout.stride, "chunks": layout.chunks}
    launch(
        _describe_kernel,
        (rows * layout.chunks,),
        arguments,
        constants | {"vocab_size": layout.vocab_size, "block": layout.chunk},
        num_warps=CHUNK_WARPS,
    )
    launch(
        _logprobs_kernel,
        (rows,),
        arguments | found,
        constants | {"chunks_block": next_power_of_2(layout.chunks)},
        num_warps=1,
    )
    return logprobs, ranks, top_ids, top_logprobs
