"""Moving whole pages: for copy-on-write, for swapping to the host and back, for transfer between workers.

A pool is [num_blocks, ...] of any dtype, each page contiguous (all layers of a block lie together). Ids are [n], int32
or int64, on the pool's device; they are not looked at by the host, so they must be below the number of blocks. Below 0
is padding: the page is neither read nor written. Pages move as bytes: NaNs and infinities as they are. Bodies that are
fused raise ValueError where shapes, dtypes or strides do not fit.
"""

from types import ModuleType

from torch import Tensor

from kernels.ops import choice
from kernels.reference import blocks as reference


def _body(pool: Tensor) -> ModuleType:
    if not choice.is_fused(pool):
        return reference
    from kernels.fused import blocks as fused

    return fused


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Page `sources[i]` to page `targets[i]`, for all i at once and in no order.

    No block may be a target twice, nor a target and the source of another pair: what it then holds is not defined. A
    block may be copied to several targets, or to itself.
    """
    _body(pool).copy_blocks(pool, sources, targets)


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Page `block_ids[i]` to `out[i]`, [n, ...], new where it is not given; returns it. Ids may repeat.

    What stands at a padding id is left as it was, undefined in a new `out`.
    """
    return _body(pool).gather_blocks(pool, block_ids, out)


def scatter_blocks(pages: Tensor, pool: Tensor, block_ids: Tensor) -> None:
    """`pages[i]` of [n, ...] to page `block_ids[i]`; no id twice. The inverse of `gather_blocks`."""
    _body(pool).scatter_blocks(pages, pool, block_ids)
