"""Whether a service would answer now: `python -m services.cli.probe HOST:PORT` for containers, by grpc.health.v1.

Exits with 0 if it serves, else with 1 and a word why.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def probe(address: str) -> str:
    """SERVING, NOT_SERVING, or the status that the call ended with."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m services.cli.probe HOST:PORT", file=sys.stderr)
        return 2
    said = probe(arguments[0])
    print(said)
    return 0 if said == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
