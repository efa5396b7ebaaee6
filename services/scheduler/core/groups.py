"""Block tables by cache group, and which blocks a group with a window holds when.

A step that computes a sample's tokens from position p on reads nothing before p - window + 1. So when it is planned,
blocks that end before are let go of; plans in flight that still read them run earlier than any that could write to
them. See shared/cache_groups.py for what a group is.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.scheduler.core.prefix import PrefixIndex
from shared.cache_groups import Window, first_block, most_blocks
from shared.prefix import BlockHash


@dataclass(slots=True)
class BlockTable:
    """What a sample holds in one group: the blocks [first, end) of its sequence. Those before were let go of, or never
    held."""

    first: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.blocks)


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """One group of a worker. `most` bounds the blocks that a sample holds in it."""

    window: Window
    block_size: int
    most: int

    @classmethod
    def of(cls, window: Window, block_size: int, chunk: int) -> "CacheGroup":
        """`chunk`: the most tokens that a step takes of a sample."""
        return cls(window, block_size, most_blocks(window, block_size, chunk))

    def first(self, position: int) -> int:
        """The first block that a step from `position` on reads."""
        return first_block(self.window, position, self.block_size)


def match_prefix(
    index: PrefixIndex, groups: Sequence[CacheGroup], hashes: list[BlockHash], tokens: array, root: BlockHash
) -> list[BlockTable]:
    """The tables with the longest prefix of `tokens`, whose full blocks have `hashes`, that every group can serve: one
    without a window needs all its blocks, one with a window those that the next token sees. All tables end alike.

    Within a window the first block's parent is known by its hash alone.
    """
    block_size, count = groups[0].block_size, len(hashes)
    tables = [BlockTable() for _ in groups]
    for number, group in enumerate(groups):
        if group.window is None:
            tables[number].blocks = index.match(number, hashes[:count], tokens, block_size, root)
            count = len(tables[number].blocks)

    def served(number: int, count: int) -> int:
        """The most blocks, up to `count`, that a group with a window can serve. A block that is not there rules out
        all prefixes whose window begins at or before it and that end behind it."""
        place = groups[number].first(count * block_size)
        while place < count:
            if not index.holds(number, place, hashes, tokens, block_size, root):
                count = place
                place = groups[number].first(count * block_size)
            else:
                place += 1
        return count

    windowed = [number for number, group in enumerate(groups) if group.window is not None]
    before = -1
    while windowed and before != count:
        before = count
        for number in windowed:
            count = served(number, count)
    for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
        if group.window is None:
            del table.blocks[count:]
        else:
            table.first = group.first(count * block_size)
            table.blocks = [index.by_hash[number][each].block for each in hashes[table.first : count]]
    return tables
