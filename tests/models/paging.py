"""Drives a Decoder as an engine would: paged blocks in shuffled order, prompts cut into chunks, rows side by side."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.worker.memory.layout import layout_of
from services.worker.memory.pool import allocate_pool
from services.worker.models.decoder import Decoder, StepBatch

POISON = 3e38
"""What unused slots hold: a single one that counts shows."""


@dataclass
class Row:
    """A sequence in the making: `tokens` are known, the first `computed` of them are in the cache."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)


class Harness:
    """Owns a pool and hands out its blocks in random order."""

    def __init__(self, decoder: Decoder, *, num_blocks: int = 64, block_size: int = 16, seed: int = 0) -> None:
        self.decoder = decoder
        self.layout = layout_of(decoder.spec, decoder.dtype, block_size)
        self.pages = allocate_pool(self.layout, num_blocks, str(decoder.device)).pages.fill_(POISON)
        self.random = random.Random(seed)
        self.free = self.random.sample(range(num_blocks), num_blocks)

    def row(self, tokens: list[int], *, shared: list[int] | None = None) -> Row:
        """A row whose first blocks may be another row's."""
        return Row(list(tokens), list(shared or []), computed=len(shared or []) * self.layout.block_size)

    def step(self, grants: list[tuple[Row, int]], *, exact: bool = False) -> Tensor:
        """Compute `count` more tokens of each row in one forward; logits of every token, row after row."""
        batch = self.batch(grants, exact=exact)
        logits = self.decoder.forward(batch, self.pages)
        for row, count in grants:
            row.computed += count
        return logits

    def batch(self, grants: list[tuple[Row, int]], *, exact: bool = False) -> StepBatch:
        size = self.layout.block_size
        tokens, positions, slots, starts = [], [], [], [0]
        for row, count in grants:
            while len(row.blocks) * size < row.computed + count:
                row.blocks.append(self.free.pop())
            for position in range(row.computed, row.computed + count):
                tokens.append(row.tokens[position])
                positions.append(position)
                slots.append(row.blocks[position // size] * size + position % size)
            starts.append(len(tokens))
        widest = max(len(row.blocks) for row, _ in grants)
        tables = [row.blocks + [-1] * (widest - len(row.blocks)) for row, _ in grants]
        return StepBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=starts,
            context_lens=[row.computed + count for row, count in grants],
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)),
            exact=exact,
        )

    def generate(
        self, prompt: list[int], num_tokens: int, *, chunks: list[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Greedy: logits of the prompt [len(prompt), vocab] and the tokens that follow."""
        row, logits = self.row(prompt), []
        for count in chunks or [len(prompt)]:
            logits.append(self.step([(row, count)]))
        latest = logits[-1][-1]
        for _ in range(num_tokens):
            row.tokens.append(int(latest.argmax()))
            if len(row.tokens) < len(prompt) + num_tokens:
                latest = self.step([(row, 1)])[-1]
        self.free += row.blocks
        return torch.cat(logits), row.tokens[len(prompt) :]

    def random_chunks(self, total: int) -> list[int]:
        cuts = sorted(self.random.sample(range(1, total), min(total - 1, self.random.randint(0, 4))))
        return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
