"""Ports, looked at before anything starts: gRPC's own refusal would come late and name nobody."""

import contextlib
import errno
import socket

import psutil

from shared.config import ConfigError

ANY_HOSTS = {"": "0.0.0.0", "localhost": "127.0.0.1"}


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((_bare(host), 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int, *, flag: str) -> None:
    """Raises ConfigError, naming the holder where it can be seen, when host:port cannot be listened on."""
    if host.startswith("unix:"):
        return
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as grpc: old connections do not count
        try:
            probe.bind((_bare(host), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"port {port} is taken{holder(port)}; choose another with {flag}") from None
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; see --host and {flag}") from None


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
