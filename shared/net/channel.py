"""The one funnel for outgoing calls between our services."""

import grpc

from shared.net.options import internal_channel_options
from shared.net.server import TOKEN_HEADER


def open_internal_channel(address: str) -> grpc.aio.Channel:
    """A channel to one of our own services. The caller closes it, and cancels its calls in a `finally`."""
    return grpc.aio.insecure_channel(address, options=internal_channel_options())


def internal_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that every internal call carries."""
    return ((TOKEN_HEADER, token),) if token else ()
