"""Who is calling, as far as an address can say."""

import ipaddress
from urllib.parse import unquote

import grpc

from shared.outcome import refuse


def is_local(peer: str) -> bool:
    """Whether a caller is on this machine. `peer` is what `context.peer()` says: `unix:…`, `ipv4:127.0.0.1:50000`,
    `ipv6:%5B::1%5D:50000`."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind in ("unix", "unix-abstract")
    try:
        host = ipaddress.ip_address(unquote(address).rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return (mapped or host).is_loopback


def require_local(context: grpc.aio.ServicerContext, call: str, instead: str) -> None:
    """For what only the operator may do, while there are no API keys to tell the operator by. Raises RefusedError
    unauthenticated; `instead` says what a caller elsewhere can do."""
    if not is_local(context.peer()):
        raise refuse("unauthenticated", f"{call} is taken from this server's own machine only: {instead}")
