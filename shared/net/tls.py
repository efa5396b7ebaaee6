"""The PEM files of TLS, a server's or a client's: tried before they are used, and refused by the name of their flag."""

import ssl
from pathlib import Path

import msgspec

from shared.config import ConfigError


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Which files one side of a connection uses. Each field is the flag of its name."""

    ssl_ca_certs: str = ""
    """Authorities of the other side. Empty: a client trusts the system's, a server asks for no certificate."""
    ssl_certfile: str = ""
    """The own certificate, behind which may follow those that lead to its authority."""
    ssl_keyfile: str = ""
    """Its private key, without a password."""

    def version(self) -> tuple[tuple[int, int], ...]:
        """Another one once a file has changed. Raises ConfigError naming the flag whose file cannot be found."""
        return tuple(_version(name, file) for name, file in msgspec.structs.asdict(self).items() if file)

    def check(self) -> None:
        """Raises ConfigError naming flag and file, where one cannot be used."""
        self.load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def load(self, context: ssl.SSLContext) -> None:
        """Gives the context these files. Raises ConfigError naming flag and file; the context is then half-filled."""
        self.version()  # which file is missing, OpenSSL does not say
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together: name both files, or neither")
        if self.ssl_certfile:
            pair = f"--ssl-certfile, --ssl-keyfile: cannot use {self.ssl_certfile} with {self.ssl_keyfile}"
            try:
                # A key that wants a password would ask for it on the terminal.
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=lambda: "")
            except OSError as error:
                raise ConfigError(f"{pair}: {_reason(error) or 'not a key pair'}") from None
        if self.ssl_ca_certs:
            try:
                context.load_verify_locations(self.ssl_ca_certs)
            except OSError as error:
                said = _reason(error) or "no certificates"
                raise ConfigError(f"--ssl-ca-certs: cannot use {self.ssl_ca_certs}: {said}") from None


def content(file: str) -> bytes:
    """What gRPC wants instead of a file's name. Raises ConfigError."""
    try:
        return Path(file).read_bytes()
    except OSError as error:  # it was tried a moment ago
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None


def _version(name: str, file: str) -> tuple[int, int]:
    try:
        stat = Path(file).stat()
    except OSError as error:
        raise ConfigError(f"--{name.replace('_', '-')}: cannot use {file}: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def _reason(error: OSError) -> str | None:
    return error.reason if isinstance(error, ssl.SSLError) else error.strerror
