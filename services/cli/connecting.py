"""How the commands that call a router find it and are known to it: its address, TLS, a key."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.cli.client import Tls

DEFAULT_ADDRESS = "127.0.0.1:50051"
CONNECT_TIMEOUT_S = 5.0
RETRIES = 2
"""Of a request that a busy server refused, after the delay that it names."""

Address = Annotated[str, typer.Option("--address", envvar="SLUICE_ADDRESS", metavar="HOST:PORT", help="The router.")]
UseTls = Annotated[
    bool, typer.Option("--tls", envvar="SLUICE_TLS", help="The router speaks TLS; any --ssl option says so too.")
]
CaCerts = Annotated[
    str,
    typer.Option(
        envvar="SLUICE_SSL_CA_CERTS",
        metavar="FILE",
        help="The router's authorities (PEM); else the system's.",
    ),
]
Certfile = Annotated[
    str,
    typer.Option(
        envvar="SLUICE_SSL_CERTFILE", metavar="FILE", help="Our certificate (PEM), where a router asks for one."
    ),
]
Keyfile = Annotated[
    str,
    typer.Option(envvar="SLUICE_SSL_KEYFILE", metavar="FILE", help="The private key of --ssl-certfile (PEM)."),
]


def tls_of(use_tls: bool, ssl_ca_certs: str, ssl_certfile: str, ssl_keyfile: str) -> "Tls | None":
    """What the options of TLS come to; None is plain text. Raises BadParameter for files that cannot be used."""
    from services.cli.client import Tls
    from shared.config import ConfigError

    files = Tls(ssl_ca_certs=ssl_ca_certs, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
    if not use_tls and files == Tls():
        return None
    try:
        files.check()
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return files


def api_key() -> str:
    """What the router's key is, where it wants one. No option: a command line is for all to read."""
    return os.environ.get("SLUICE_API_KEY", "")
