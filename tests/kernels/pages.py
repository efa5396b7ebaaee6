"""Builds paged caches: sequences of random K and V laid into shuffled blocks, all other slots holding huge numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops.attention import paged_attention, plan_attention, write_kv

LAYERS = 3
"""Pools have more layers than the one used, so that strides and offsets are put to the test."""

POISON = 3e38
"""What unused slots hold: its products overflow, and a single one that counts shows."""


@dataclass(frozen=True)
class Heads:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16


@dataclass(frozen=True)
class Sequence:
    """All of a sequence's q [n, heads, dim] and kv [n, 2, kv_heads, dim]."""

    q: Tensor
    kv: Tensor


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of sequence `sequence_id`, computed in one step."""

    sequence_id: int
    start: int
    end: int


def draw(heads: Heads, length: int, dtype: torch.dtype, seed: int) -> Sequence:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(length, heads.num_heads, heads.head_dim, generator=generator)
    kv = torch.randn(length, 2, heads.num_kv_heads, heads.head_dim, generator=generator)
    return Sequence(q.to(dtype), kv.to(dtype))


class Cache:
    """A pool and the blocks of each sequence in it."""

    def __init__(self, heads: Heads, sequences: list[Sequence], seed: int = 0, device: str = "cpu") -> None:
        self.heads, self.device = heads, device
        self.sequences = [Sequence(sequence.q.to(device), sequence.kv.to(device)) for sequence in sequences]
        needed = [-(-len(sequence.q) // heads.block_size) for sequence in sequences]
        num_blocks = sum(needed) + 3
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.spare = order.pop()
        shape = (num_blocks, LAYERS, 2, heads.num_kv_heads, heads.block_size, heads.head_dim)
        self.pool = torch.full(shape, POISON, dtype=sequences[0].kv.dtype, device=device)

    def step(
        self, chunks: list[Chunk], *, body=None, window: int | None = None, exact: bool = False, **scoring: Any
    ) -> list[Tensor]:
        """Write and attend the chunks in one step; the result of each. `body` defaults to the public door; `scoring`
        goes to its paged_attention."""
        q = torch.cat([self.sequences[chunk.sequence_id].q[chunk.start : chunk.end] for chunk in chunks])
        kv = torch.cat([self.sequences[chunk.sequence_id].kv[chunk.start : chunk.end] for chunk in chunks])
        plan, write, attend = (
            (body.plan_attention, body.write_kv, body.paged_attention)
            if body
            else (plan_attention, write_kv, paged_attention)
        )
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.end - chunk.start)
        planned = plan(
            self.pool,
            starts,
            [chunk.end for chunk in chunks],
            self._block_tables(chunks),
            self._slots(chunks),
            num_heads=self.heads.num_heads,
            window=window,
            exact=exact,
        )
        write(kv, self.pool, 1, planned)
        out = attend(q, self.pool, 1, planned, self.heads.head_dim**-0.5, **scoring)
        return list(out.split([chunk.end - chunk.start for chunk in chunks]))

    def let_go(self, chunks: list[Chunk], window: int | None) -> None:
        """From now on the blocks before the chunks' windows are a stranger's, full of POISON."""
        for chunk in chunks:
            gone = 0 if window is None else max(0, chunk.start - window + 1) // self.heads.block_size
            self.tables[chunk.sequence_id][:gone] = [self.spare] * gone

    def _block_tables(self, chunks: list[Chunk]) -> Tensor:
        widest = max(len(self.tables[chunk.sequence_id]) for chunk in chunks)
        tables = [self.tables[chunk.sequence_id] for chunk in chunks]
        return torch.tensor([table + [-1] * (widest - len(table)) for table in tables], dtype=torch.int32)

    def _slots(self, chunks: list[Chunk]) -> Tensor:
        size = self.heads.block_size
        return torch.tensor(
            [
                self.tables[chunk.sequence_id][position // size] * size + position % size
                for chunk in chunks
                for position in range(chunk.start, chunk.end)
            ]
        )
