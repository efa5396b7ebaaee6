"""How K and V lie in memory, and what a block costs.

A block is contiguous, `[layer][K/V][head][slot][dim]`: one descriptor moves it, one index_select over its heads
yields [row, head, context, dim], and a slice of heads is contiguous. It holds the layers of one cache group, whichever
(shared/cache_groups.py).
"""

import msgspec
import torch

from services.worker.models.spec import ModelSpec
from shared.cache_groups import Window, group_layers

DEFAULT_BLOCK_SIZE = 16


class BlockLayout(msgspec.Struct, frozen=True):
    """The shape of one block; sizes are in elements of `dtype` unless they say bytes.

    `num_layers` are those of a cache group, `windows` has one entry per group.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[Window, ...] = (None,)

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
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize * self.block_size

    @property
    def bytes_per_token(self) -> int:
        """In all groups, padding included; of a token that every window still sees."""
        return len(self.windows) * self.bytes_per_block // self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


def layout_of(spec: ModelSpec, dtype: torch.dtype, block_size: int = DEFAULT_BLOCK_SIZE) -> BlockLayout:
    groups = group_layers(spec.windows)
    return BlockLayout(groups.layers, spec.num_kv_heads, block_size, spec.head_dim, dtype, groups.windows)
