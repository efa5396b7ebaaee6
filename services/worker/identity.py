"""Who a worker is, as it tells its scheduler."""

import msgspec

from shared import PROTOCOL_VERSION


class WorkerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker registers with. `address` is where the scheduler reaches it."""

    worker: str
    address: str
    model_fingerprint: str
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    block_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    windows: tuple[int, ...] = (0,)
    """Of each cache group; 0 sees all positions."""
    rank: int = 0
    world: int = 1
    protocol_version: int = PROTOCOL_VERSION


class Lease(msgspec.Struct, frozen=True):
    """What a registration grants: to be renewed before `ttl_ms` have passed."""

    id: int
    ttl_ms: int
