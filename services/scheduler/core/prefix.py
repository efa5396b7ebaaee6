"""The prefix index: which block holds which prefix, in each cache group. The hash narrows, the token ids decide."""

from array import array
from dataclasses import dataclass, field

import msgspec

from shared.prefix import BlockHash, short


class Indexed(msgspec.Struct, frozen=True):
    """One indexed block: its cache group, its place in the chain and the tokens in it."""

    block: int
    group: int
    hash: BlockHash
    parent: BlockHash
    token_ids: array


@dataclass(slots=True)
class PrefixIndex:
    """Owns the mapping (cache group, hash) → block. Owns no block: references and eviction are the pool's."""

    num_groups: int = 1
    by_hash: list[dict[BlockHash, Indexed]] = field(init=False)
    """By cache group."""
    by_block: dict[int, Indexed] = field(default_factory=dict)
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    """Short hashes that came and went in the first group since the last `drain_changes`: what routers hear of."""

    def __post_init__(self) -> None:
        self.by_hash = [{} for _ in range(self.num_groups)]

    def match(self, group: int, hashes: list[BlockHash], tokens: array, block_size: int, root: BlockHash) -> list[int]:
        """The group's blocks of the longest indexed prefix of `tokens`, whose full blocks have `hashes`."""
        found: list[int] = []
        by_hash, parent = self.by_hash[group], root
        for i, block_hash in enumerate(hashes):
            entry = by_hash.get(block_hash)
            start = i * block_size
            if entry is None or entry.parent != parent or entry.token_ids != tokens[start : start + block_size]:
                break
            found.append(entry.block)
            parent = block_hash
        return found

    def holds(
        self, group: int, place: int, hashes: list[BlockHash], tokens: array, block_size: int, root: BlockHash
    ) -> bool:
        """Whether the group has block `place` of `tokens`, wherever its parents are."""
        entry = self.by_hash[group].get(hashes[place])
        start, parent = place * block_size, hashes[place - 1] if place else root
        return entry is not None and entry.parent == parent and entry.token_ids == tokens[start : start + block_size]

    def add(self, block: int, group: int, block_hash: BlockHash, parent: BlockHash, token_ids: array) -> bool:
        """Indexes a block; False where the group has one for the prefix already (the first one stays)."""
        by_hash = self.by_hash[group]
        if block_hash in by_hash:
            return False
        entry = Indexed(block, group, block_hash, parent, token_ids)
        by_hash[block_hash] = entry
        self.by_block[block] = entry
        if group == 0:
            self.stored.append(short(block_hash))
        return True

    def remove(self, block: int) -> bool:
        """Forgets a block; False where it was not indexed."""
        entry = self.by_block.pop(block, None)
        if entry is None:
            return False
        del self.by_hash[entry.group][entry.hash]
        if entry.group == 0:
            self.removed.append(short(entry.hash))
        return True

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        stored, removed = self.stored, self.removed
        if stored or removed:
            self.stored, self.removed = [], []
        return stored, removed
