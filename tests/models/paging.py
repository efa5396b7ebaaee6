"""Drives a Decoder as an engine would: paged blocks in shuffled order, prompts cut into chunks, rows side by side."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.worker.memory.layout import layout_of
from services.worker.memory.pool import allocate_pool
from services.worker.models.decoder import Decoder, StepBatch
from shared.cache_groups import first_block

POISON = 3e38
"""What unused slots hold: a single one that counts shows."""


@dataclass
class Row:
    """A sequence in the making: `tokens` are known, the first `computed` of them are in the cache. `tables` has the
    blocks of each cache group; the first `gone` of them are others' by now."""

    tokens: list[int]
    tables: list[list[int]]
    gone: list[int]
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

    def row(self, tokens: list[int], *, shared: list[list[int]] | None = None) -> Row:
        """A row whose first blocks, in each cache group, may be another row's."""
        tables = [list(table) for table in shared] if shared else [[] for _ in self.layout.windows]
        return Row(list(tokens), tables, [0] * len(tables), computed=len(tables[0]) * self.layout.block_size)

    def let_go(self, row: Row) -> None:
        """Poisons the blocks that no window of the row sees any more; the next row to want a block gets one of them."""
        for group, (window, table) in enumerate(zip(self.layout.windows, row.tables, strict=True)):
            stale = table[row.gone[group] : first_block(window, row.computed, self.layout.block_size)]
            self.pages[stale] = POISON
            self.free += stale
            row.gone[group] += len(stale)

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
            for table in row.tables:
                while len(table) * size < row.computed + count:
                    table.append(self.free.pop())
            for position in range(row.computed, row.computed + count):
                tokens.append(row.tokens[position])
                positions.append(position)
                slots.append([table[position // size] * size + position % size for table in row.tables])
            starts.append(len(tokens))
        widest = max(len(row.tables[0]) for row, _ in grants)
        tables = [
            [row.tables[group] + [-1] * (widest - len(row.tables[group])) for row, _ in grants]
            for group in range(len(self.layout.windows))
        ]
        return StepBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots).T.contiguous(),
            query_starts=starts,
            context_lens=[row.computed + count for row, count in grants],
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)),
            exact=exact,
        )

    def generate(
        self, prompt: list[int], num_tokens: int, *, chunks: list[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Greedy: logits of the prompt [len(prompt), vocab] and the tokens that follow. Blocks outside a window go to
        others on the way."""
        row, logits = self.row(prompt), []
        for count in chunks or [len(prompt)]:
            logits.append(self.step([(row, count)]))
            self.let_go(row)
        latest = logits[-1][-1]
        for _ in range(num_tokens):
            row.tokens.append(int(latest.argmax()))
            if len(row.tokens) < len(prompt) + num_tokens:
                latest = self.step([(row, 1)])[-1]
                self.let_go(row)
        self.free += [block for gone, table in zip(row.gone, row.tables, strict=True) for block in table[gone:]]
        return torch.cat(logits), row.tokens[len(prompt) :]

    def random_chunks(self, total: int) -> list[int]:
        cuts = sorted(self.random.sample(range(1, total), min(total - 1, self.random.randint(0, 4))))
        return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
