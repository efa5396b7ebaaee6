"""How K and V lie in memory, and what a block costs.

A block is contiguous, `[layer][K/V][head][slot][dim]`: one descriptor moves it, one index_select over its heads
yields [row, head, context, dim], and a slice of heads is contiguous.
"""

import msgspec
import torch

from services.worker.models.spec import ModelSpec

DEFAULT_BLOCK_SIZE = 16


class BlockLayout(msgspec.Struct, frozen=True):
    """The shape of one block; sizes are in elements of `dtype` unless they say bytes."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Of [layer][K/V][head][slot][dim]."""
        head = self.block_size * self.head_dim
        return (2 * self.num_kv_heads * head, self.num_kv_heads * head, head, self.head_dim, 1)

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def layout_of(spec: ModelSpec, dtype: torch.dtype, block_size: int = DEFAULT_BLOCK_SIZE) -> BlockLayout:
    return BlockLayout(spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim, dtype)
