"""The certificate of the public ports, HTTP and gRPC, read again when its files change."""

import ssl

import grpc
import structlog

from shared.config import ConfigError
from shared.net.tls import Tls, content

log = structlog.get_logger("tls")


class Certificate:
    """A chain and its key, and the authorities of clients where these need a certificate: for new connections. Those
    that are open keep what they began with."""

    def __init__(self, files: Tls) -> None:
        """Raises ConfigError, naming flag and file."""
        if not files.ssl_certfile:
            raise ConfigError("--ssl-ca-certs and --ssl-keyfile need --ssl-certfile: name all of them, or none")
        self._files = files
        self._seen = files.version()
        self._latest, first = self._load()
        self._renewed: grpc.ServerCertificateConfiguration | None = None
        """For gRPC, which takes it with its next connection."""
        self.context = self._latest
        """Of the HTTP door."""
        self.context.sni_callback = self._take_latest
        self.credentials = grpc.dynamic_ssl_server_credentials(
            first,
            self._take_renewed,  # type: ignore[arg-type]  # its documentation allows None
            require_client_authentication=bool(files.ssl_ca_certs),
        )
        """Of the gRPC port."""

    async def reload(self) -> None:
        """Files that cannot be used, or do not yet fit each other, leave the certificate as it was."""
        try:
            seen = self._files.version()
            if seen == self._seen:
                return
            self._seen = seen
            self._latest, self._renewed = self._load()
            log.info("certificate_loaded", file=self._files.ssl_certfile)
        except ConfigError as error:
            log.error("certificate_not_loaded", reason=str(error), effect="the certificate stays as it was")

    def _load(self) -> tuple[ssl.SSLContext, grpc.ServerCertificateConfiguration]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 and later
        self._files.load(context)
        if self._files.ssl_ca_certs:
            context.verify_mode = ssl.CERT_REQUIRED
            # Nobody takes up an old session: in it a certificate would not be asked for again.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        pair = content(self._files.ssl_keyfile), content(self._files.ssl_certfile)
        authorities = content(self._files.ssl_ca_certs) if self._files.ssl_ca_certs else None
        return context, grpc.ssl_server_certificate_configuration([pair], authorities)

    def _take_latest(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in each handshake: a context cannot forget an authority, so each load makes another."""
        connection.context = self._latest

    def _take_renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads before each handshake. None: as before."""
        renewed, self._renewed = self._renewed, None
        return renewed
