"""The paged KV pool: one tensor, allocated once."""

import msgspec
import torch
from torch import Tensor

from services.worker.memory.layout import BlockLayout

AVAILABLE_SHARE = 0.5
"""Of the memory that is free when the weights are loaded; the rest is for activations and for others."""


class PoolTooSmall(Exception):
    """The memory offered does not hold a single block; the message says what would."""


class Pool(msgspec.Struct, frozen=True):
    """`pages` is [num_blocks, layers of a cache group, 2, num_kv_heads, block_size, head_dim], zero at first."""

    layout: BlockLayout
    pages: Tensor

    @property
    def num_blocks(self) -> int:
        return self.pages.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.pages.nbytes


def allocate_pool(layout: BlockLayout, num_blocks: int, device: str = "cpu") -> Pool:
    """Every page is written to: memory that is only promised would be taken in live traffic, fault by fault. On a GPU
    the pool is one cudaMalloc of its own, which another process can open: torch cuts such a size from no other."""
    pages = torch.empty(num_blocks, *layout.shape, dtype=layout.dtype, device=device)
    return Pool(layout, pages.zero_())


def count_blocks(layout: BlockLayout, *, memory_bytes: int | None = None, available_bytes: int | None = None) -> int:
    """How many blocks fit into `memory_bytes` if given, else into a share of what is available.

    `available_bytes` stands in for the machine's own figure in tests. Raises PoolTooSmall.
    """
    if memory_bytes is None:
        memory_bytes = int((_available_bytes() if available_bytes is None else available_bytes) * AVAILABLE_SHARE)
    num_blocks = memory_bytes // layout.bytes_per_block
    if num_blocks < 1:
        raise PoolTooSmall(
            f"{memory_bytes:,} bytes do not hold one block of {layout.bytes_per_block:,} bytes: "
            "give more with --kv-cache-memory-bytes, or a smaller --block-size"
        )
    return num_blocks


def _available_bytes() -> int:
    import psutil

    return psutil.virtual_memory().available
