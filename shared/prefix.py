"""The chain of block hashes that names a prefix: SHA-256 over (parent, token ids), begun with a salt.

Router (placement) and scheduler (prefix index) compute the same chain. The hash narrows; the scheduler compares the
token ids before it trusts a hit.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

BlockHash = bytes
"""32 bytes."""

SHORT_HASH_BYTES = 8
"""How much of a hash travels in frames and in a router's view; a collision there costs a detour, never a token."""


def root_hash(salt: bytes, *, exact: bool) -> BlockHash:
    """Where a chain begins. Exact and ordinary requests never share blocks, nor do two salts."""
    mode = b"exact" if exact else b"plain"
    return hashlib.sha256(b"sluice-prefix-v1\0" + mode + b"\0" + salt).digest()


def next_hash(parent: BlockHash, token_ids: array) -> BlockHash:
    """The hash of one full block (uint32) that follows `parent`."""
    return hashlib.sha256(parent + token_ids.tobytes()).digest()


def chain(token_ids: Sequence[int], block_size: int, root: BlockHash) -> list[BlockHash]:
    """The hashes of every full block of `token_ids`, in order; a trailing partial block has none."""
    packed = array("I", token_ids)
    hashes: list[BlockHash] = []
    parent = root
    for start in range(0, len(packed) - block_size + 1, block_size):
        parent = next_hash(parent, packed[start : start + block_size])
        hashes.append(parent)
    return hashes


def short(block_hash: BlockHash) -> bytes:
    """The part of a hash that travels."""
    return block_hash[:SHORT_HASH_BYTES]


def unpack_short(packed: bytes) -> Iterable[bytes]:
    """Splits packed short hashes."""
    return (packed[i : i + SHORT_HASH_BYTES] for i in range(0, len(packed), SHORT_HASH_BYTES))
