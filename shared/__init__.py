"""What services share: a contract and a few value types. Never torch, never a service."""

__version__ = "0.1.0"

PROTOCOL_VERSION = 3
"""Of the internal links (scheduling.proto, execution.proto); both ends must agree."""
