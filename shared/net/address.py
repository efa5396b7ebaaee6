"""HOST:PORT as gRPC reads it."""


def join_address(host: str, port: int) -> str:
    """`host:port`; an IPv6 address gets its brackets."""
    bare_ipv6 = ":" in host and not host.startswith(("[", "unix:"))
    return f"[{host}]:{port}" if bare_ipv6 else f"{host}:{port}"
