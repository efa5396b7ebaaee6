"""From the addresses an operator gives to the sockets behind them."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

from shared.config import ConfigError

RESOLVE_TIMEOUT_S = 5.0


def check_addresses(addresses: Sequence[str]) -> None:
    """Raises ConfigError for what no scheduler could have."""
    if not addresses:
        raise ConfigError("--scheduler: at least one HOST:PORT is needed")
    for address in addresses:
        _, _, port = address.rpartition(":")
        if not address.startswith("unix:") and not (":" in address and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(f"--scheduler: {address!r} is not HOST:PORT")


async def resolve(address: str) -> list[str]:
    """gRPC targets of every process behind `address`: all addresses of a name, one for anything else.

    Raises OSError or TimeoutError where the name cannot be resolved.
    """
    host, _, port = address.rpartition(":")
    if address.startswith(("unix:", "dns:", "ipv4:", "ipv6:")) or not host or _is_literal(host):
        return [address]
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        found = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    hosts = {family: sorted({str(entry[4][0]) for entry in found if entry[0] == family}) for family, *_ in found}
    if socket.AF_INET in hosts:  # a dual-stack process would otherwise be linked twice
        return [f"{one}:{port}" for one in hosts[socket.AF_INET]]
    return [f"[{one}]:{port}" for one in hosts.get(socket.AF_INET6, [])]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
