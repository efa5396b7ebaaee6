"""Whether a service would answer now, for containers: `python -m services.cli.probe HOST:PORT` by grpc.health.v1.

Of a router that speaks TLS: `python -m services.cli.probe https://HOST:PORT`, with its HTTP port. Whose certificate it
has is not asked: the prober calls its own container, by an address that no certificate need name. Where clients must
show a certificate, the probe shows the one that SLUICE_SSL_CERTFILE and SLUICE_SSL_KEYFILE name.

Exits with 0 if it serves, else with 1 and a word why.
"""

import http.client
import os
import ssl
import sys
from contextlib import closing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.config import ConfigError
from shared.net.tls import Tls

TIMEOUT_S = 3.0
HTTPS = "https://"


def probe(address: str) -> str:
    """SERVING, NOT_SERVING, or the status that the call ended with."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def probe_https(address: str, own: Tls) -> str:
    """SERVING, NOT_SERVING, or what is in the way; `own` is the certificate to show."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        own.load(context)
        with closing(http.client.HTTPSConnection(address, timeout=TIMEOUT_S, context=context)) as connection:
            connection.request("GET", "/health")
            return "SERVING" if connection.getresponse().status == http.client.OK else "NOT_SERVING"
    except (ConfigError, OSError, http.client.HTTPException) as error:
        return str(error)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m services.cli.probe HOST:PORT | https://HOST:PORT", file=sys.stderr)
        return 2
    address = arguments[0]
    if address.startswith(HTTPS):
        files = Tls(
            ssl_certfile=os.environ.get("SLUICE_SSL_CERTFILE", ""), ssl_keyfile=os.environ.get("SLUICE_SSL_KEYFILE", "")
        )
        said = probe_https(address.removeprefix(HTTPS), files)
    else:
        said = probe(address)
    print(said)
    return 0 if said == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
