"""Identifiers: short, random where they must be unguessable or unique across processes."""

import secrets


def new_request_id() -> str:
    """A request id for a client that sent none: `req-` and 24 hexadecimal digits."""
    return f"req-{secrets.token_hex(12)}"


def new_instance_id(service: str) -> str:
    """Names one process of a service: `worker-3f9a1c02`. A restarted process has another."""
    return f"{service}-{secrets.token_hex(4)}"


def new_error_id() -> str:
    """Names one internal error, for the client and for the log: `err-` and 12 hexadecimal digits."""
    return f"err-{secrets.token_hex(6)}"


def new_seed() -> int:
    """A sampling seed in [0, 2**63), drawn where a request brings none."""
    return secrets.randbits(63)
