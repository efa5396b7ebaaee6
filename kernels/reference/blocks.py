"""Moving whole pages: `pool[block]` is one page, whatever its dimensions and dtype.

Ids are integers [n]; each page that is moved is read once and written once.
"""

import torch
from torch import Tensor


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """pool[targets[i]] = pool[sources[i]] where neither id is below 0."""
    kept = (sources >= 0) & (targets >= 0)
    pool[targets[kept].long()] = pool[sources[kept].long()]


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """out[i] = pool[block_ids[i]] where the id is not below 0: [n, *page]."""
    if out is None:
        out = torch.empty(len(block_ids), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    kept = block_ids >= 0
    out[kept] = pool[block_ids[kept].long()]
    return out


def scatter_blocks(pages: Tensor, pool: Tensor, block_ids: Tensor) -> None:
    """pool[block_ids[i]] = pages[i] where the id is not below 0; `pages` is [n, *page]."""
    kept = block_ids >= 0
    pool[block_ids[kept].long()] = pages[kept]
