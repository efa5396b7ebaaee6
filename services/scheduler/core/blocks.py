"""The blocks of one KV pool: each is free, cached (indexed, referenced by nobody) or referenced."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from services.scheduler.core.groups import BlockTable
from services.scheduler.core.prefix import PrefixIndex


@dataclass(slots=True)
class BlockPool:
    """Owns references, the free list and the order of eviction.

    A cached block's place in `cached` is its turn to be evicted, the first one first. `release` lets go of block tables
    from their end, and whoever holds a block holds its parents, but for those outside a window: so leaves are evicted
    before what they hang on.
    """

    num_blocks: int
    block_size: int
    num_groups: int = 1
    index: PrefixIndex = field(init=False)
    free: deque[int] = field(init=False)
    cached: "OrderedDict[int, None]" = field(default_factory=OrderedDict)
    references: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = PrefixIndex(self.num_groups)
        self.free = deque(range(self.num_blocks))
        self.references = [0] * self.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out: free ones, and cached ones to evict."""
        return len(self.free) + len(self.cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self.free) - len(self.cached)

    def num_cached_among(self, blocks: list[int]) -> int:
        return sum(block in self.cached for block in blocks)

    def take(self) -> int:
        """A block with one reference, its content undefined. Raises IndexError when none is available."""
        if self.free:
            block = self.free.popleft()
        else:
            if not self.cached:
                raise IndexError("no block is available")
            block, _ = self.cached.popitem(last=False)
            self.index.remove(block)
        self.references[block] = 1
        return block

    def take_many(self, count: int) -> list[int]:
        """The same of several blocks."""
        return [self.take() for _ in range(count)]

    def share(self, block: int) -> None:
        """One more reference to a block that the index knows."""
        if self.references[block] == 0:
            del self.cached[block]
        self.references[block] += 1

    def release_tables(self, tables: list[BlockTable]) -> None:
        """Lets go of a sample's tables, leaves first, all groups side by side."""
        if len(tables) == 1:
            self.release(tables[0].blocks)
            return
        placed = ((place, block) for table in tables for place, block in enumerate(table.blocks, table.first))
        self.release([block for _, block in sorted(placed)])

    def release(self, blocks: list[int]) -> None:
        """Lets go of blocks in order of their places, leaves first."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.index.by_block:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def withdraw(self, block: int) -> None:
        """Takes a block out of the index because its content never came to be."""
        if self.index.remove(block) and self.references[block] == 0:
            del self.cached[block]
            self.free.append(block)
