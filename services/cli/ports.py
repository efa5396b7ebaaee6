"""Ports, looked at before anything starts: gRPC's own refusal would come late and name nobody."""

import contextlib
import errno
import socket

import psutil

from shared.config import ConfigError
from shared.net.address import join_address

ANY_HOSTS = {"": "0.0.0.0", "localhost": "127.0.0.1"}


def free_port(host: str = "127.0.0.1", *, flag: str = "") -> int:
    """A port that nobody listens on now. Raises ConfigError where `host` cannot be listened on."""
    return _bind(host, 0, flag=flag)


def require_free(host: str, port: int, *, flag: str) -> None:
    """Raises ConfigError, naming the holder where it can be seen, when host:port cannot be listened on."""
    if not host.startswith("unix:"):
        _bind(host, port, flag=flag)


def bind_shared(host: str, port: int, *, flag: str) -> socket.socket:
    """A socket that holds a port for processes that share it: bound, not listening. Raises ConfigError."""
    held = socket.socket(_family(host))
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((_bare(host), port))
        return held
    except (OSError, UnicodeError):
        held.close()
        raise ConfigError(f"cannot listen on {join_address(host, port)}; choose another with {flag}") from None


def _bind(host: str, port: int, *, flag: str) -> int:
    """Binds for a moment and returns the port."""
    try:
        with socket.socket(_family(host)) as probe:
            if port:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as grpc: old connections do not count
            probe.bind((_bare(host), port))
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:  # the latter is a name that no resolver takes
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is taken{holder(port)}; choose another with {flag}") from None
        reason = error.strerror if isinstance(error, OSError) else "this is no host name"
        raise ConfigError(f"cannot listen on {join_address(host, port)}: {reason}; see --host and {flag}") from None


def holder(port: int) -> str:
    """` by python (pid 123)`, or nothing where the system does not say."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bare(host: str) -> str:
    return ANY_HOSTS.get(host, host.strip("[]"))
