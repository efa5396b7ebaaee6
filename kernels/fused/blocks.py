"""Moving whole pages as words of four bytes: a program takes a piece of one page."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch, next_power_of_2

PIECE_BYTES = 16 * 1024
"""Bytes of a program: eight loads of 16 bytes in each of 128 threads, all on their way before the first is stored."""


@triton.jit
def _move_pages_kernel(
    source, source_ids, target, target_ids,
    words: tl.constexpr, source_stride: tl.constexpr, target_stride: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Page source_ids[i] to page target_ids[i]; absent ids are 0, 1, 2 and so on."""
    index = tl.program_id(0).to(tl.int64)
    from_id = index
    to_id = index
    if source_ids is not None:
        from_id = tl.load(source_ids + index).to(tl.int64)
    if target_ids is not None:
        to_id = tl.load(target_ids + index).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = (column < words) & (from_id >= 0) & (to_id >= 0)
    page = tl.load(source + from_id * source_stride + column, mask=mask)
    tl.store(target + to_id * target_stride + column, page, mask=mask)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See kernels.ops.blocks."""
    _check_ids(sources=sources, targets=targets)
    if sources.shape != targets.shape:
        raise ValueError(f"{len(sources)} sources, but {len(targets)} targets")
    _move(pool, sources, pool, targets)


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor | None = None) -> Tensor:
    _check_ids(block_ids=block_ids)
    if out is None:
        out = torch.empty(len(block_ids), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    _check_pages(out, pool, block_ids)
    _move(pool, block_ids, out, None)
    return out


def scatter_blocks(pages: Tensor, pool: Tensor, block_ids: Tensor) -> None:
    _check_ids(block_ids=block_ids)
    _check_pages(pages, pool, block_ids)
    _move(pages, None, pool, block_ids)


def _move(source: Tensor, source_ids: Tensor | None, target: Tensor, target_ids: Tensor | None) -> None:
    word = _word(source, target)
    source, target = _words(source, word), _words(target, word)
    ids = source_ids if source_ids is not None else target_ids
    num_pages = 0 if ids is None else len(ids)
    block = min(PIECE_BYTES // word.itemsize, next_power_of_2(max(source.shape[1], 1)))
    launch(
        _move_pages_kernel,
        (num_pages, cdiv(source.shape[1], block)),
        {"source": source, "source_ids": source_ids, "target": target, "target_ids": target_ids},
        {
            "words": source.shape[1],
            "source_stride": source.stride(0),
            "target_stride": target.stride(0),
            "block": block,
        },
        num_warps=min(max(block * word.itemsize // (128 * 32), 1), 4),
    )


def _word(*pools: Tensor) -> torch.dtype:
    """int32 where pages begin and end at whole ones, else bytes."""
    begins = [
        part * pool.element_size()
        for pool in pools
        for part in (math.prod(pool.shape[1:]), pool.stride(0), pool.storage_offset())
    ]
    return torch.int32 if all(begin % torch.int32.itemsize == 0 for begin in begins) else torch.uint8


def _words(pool: Tensor, word: torch.dtype) -> Tensor:
    """[pages, words]; a view, as each page is contiguous."""
    page = pool[0] if len(pool) else pool.new_empty(pool.shape[1:])
    if not page.is_contiguous():
        raise ValueError(f"pages must be contiguous, not {list(pool.shape)} by {list(pool.stride())}")
    return pool.as_strided((len(pool), page.numel()), (pool.stride(0), 1)).view(word)


def _check_ids(**ids: Tensor) -> None:
    for name, tensor in ids.items():
        if tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be [n] int32 or int64, contiguous, not {tensor.dtype} {list(tensor.shape)}")


def _check_pages(pages: Tensor, pool: Tensor, block_ids: Tensor) -> None:
    expected = (len(block_ids), *pool.shape[1:])
    if pages.shape != expected or pages.dtype != pool.dtype:
        raise ValueError(f"pages must be {pool.dtype} {list(expected)}, not {pages.dtype} {list(pages.shape)}")
