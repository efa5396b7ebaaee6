"""The certificate of the HTTP door, read again when its files change."""

import ssl
from pathlib import Path

import structlog

from shared.config import ConfigError

log = structlog.get_logger("http")


class Certificate:
    """A chain and its key, as a context for new connections; those that are open keep what they began with."""

    def __init__(self, certfile: str, keyfile: str) -> None:
        """Raises ConfigError, naming the flags."""
        if not (certfile and keyfile):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together: name both files, or neither")
        self._files = (Path(certfile), Path(keyfile))
        self._seen = self._version()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later
        self._load(self.context)

    async def reload(self) -> None:
        """Files that cannot be used, or do not yet fit each other, leave the certificate as it was."""
        try:
            seen = self._version()
            if seen == self._seen:
                return
            self._seen = seen
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a trial: the one in use is to stay whole
            self._load(self.context)
            log.info("certificate_loaded", file=str(self._files[0]))
        except ConfigError as error:
            log.error("certificate_not_loaded", reason=str(error), effect="the certificate stays as it was")

    def _version(self) -> tuple[tuple[int, int], ...]:
        try:
            stats = [file.stat() for file in self._files]
        except OSError as error:
            raise self._unusable(error.strerror) from None
        return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # A key that wants a password would ask for it on the terminal.
            context.load_cert_chain(*self._files, password=lambda: "")
        except ssl.SSLError as error:
            raise self._unusable(error.reason) from None
        except OSError as error:
            raise self._unusable(error.strerror) from None

    def _unusable(self, why: str | None) -> ConfigError:
        cert, key = self._files
        return ConfigError(f"--ssl-certfile, --ssl-keyfile: cannot use {cert} with {key}: {why or 'not a key pair'}")
