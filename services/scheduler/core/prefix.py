"""The prefix index: which block holds which prefix. The hash narrows, the token ids decide."""

from array import array
from dataclasses import dataclass, field

import msgspec

from shared.prefix import BlockHash, short


class Indexed(msgspec.Struct, frozen=True):
    """One indexed block: its place in the chain and the tokens in it."""

    block: int
    hash: BlockHash
    parent: BlockHash
    token_ids: array


@dataclass(slots=True)
class PrefixIndex:
    """Owns the mapping hash → block. Owns no block: references and eviction are the pool's."""

    by_hash: dict[BlockHash, Indexed] = field(default_factory=dict)
    by_block: dict[int, Indexed] = field(default_factory=dict)
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    """Short hashes that came and went since the last `drain_changes`."""

    def match(self, hashes: list[BlockHash], tokens: array, block_size: int, root: BlockHash) -> list[int]:
        """The blocks of the longest indexed prefix of `tokens`, whose full blocks have `hashes`."""
        found: list[int] = []
        parent = root
        for i, block_hash in enumerate(hashes):
            entry = self.by_hash.get(block_hash)
            start = i * block_size
            if entry is None or entry.parent != parent or entry.token_ids != tokens[start : start + block_size]:
                break
            found.append(entry.block)
            parent = block_hash
        return found

    def add(self, block: int, block_hash: BlockHash, parent: BlockHash, token_ids: array) -> bool:
        """Indexes a block; False where the prefix has one already (the first one stays)."""
        if block_hash in self.by_hash:
            return False
        entry = Indexed(block, block_hash, parent, token_ids)
        self.by_hash[block_hash] = entry
        self.by_block[block] = entry
        self.stored.append(short(block_hash))
        return True

    def remove(self, block: int) -> bool:
        """Forgets a block; False where it was not indexed."""
        entry = self.by_block.pop(block, None)
        if entry is None:
            return False
        del self.by_hash[entry.hash]
        self.removed.append(short(entry.hash))
        return True

    def drain_changes(self) -> tuple[list[bytes], list[bytes]]:
        stored, removed = self.stored, self.removed
        if stored or removed:
            self.stored, self.removed = [], []
        return stored, removed
