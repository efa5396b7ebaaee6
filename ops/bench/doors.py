"""What a token costs the router by each of its doors: the same streams through gRPC and through HTTP, in turn.

`python -m ops.bench.doors` writes ops/bench/results/doors.json: medians of the router's CPU time per token.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path

from ops.bench.cluster import Cluster
from ops.bench.completions import stream_completion
from ops.bench.machine import describe, exact_cpu_seconds
from services.cli.client import Client, Delta, Request

RESULT = Path(__file__).parent / "results" / "doors.json"
PROMPT = "def read_lines(path):\n"


async def by_grpc(cluster: Cluster, streams: int, tokens: int) -> int:
    """The number of tokens that came."""

    async def one(client: Client) -> int:
        request = Request(prompt=PROMPT, max_tokens=tokens, ignore_eos=True)
        return sum([len(event.token_ids) async for event in client.generate(request) if isinstance(event, Delta)])

    async with Client(cluster.address) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(streams))))


async def by_http(cluster: Cluster, streams: int, tokens: int) -> int:
    """The number of tokens that came."""
    ask = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    answers = await asyncio.gather(*(stream_completion(cluster.http["router"], ask) for _ in range(streams)))
    return sum(answer.tokens for answer in answers)


DOORS = {"grpc": by_grpc, "http": by_http}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("up_flags", nargs="*", help="flags for `sluice up`, after --")
    options = parser.parse_args()
    cluster = Cluster(["--port=0", "--metrics-port=0", "--threads=1", *options.up_flags])
    found: dict[str, list[float]] = {name: [] for name in DOORS}
    try:
        for repeat in range(options.repeats + 1):
            for name, door in DOORS.items():
                before = exact_cpu_seconds(cluster.pids["router"])
                tokens = asyncio.run(door(cluster, options.streams, options.tokens))
                spent = exact_cpu_seconds(cluster.pids["router"]) - before
                if repeat:  # the first is a warm-up
                    found[name].append(spent / tokens * 1e6)
    finally:
        cluster.close()
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    told = {
        "machine": describe(),
        "streams": options.streams,
        "tokens_each": options.tokens,
        "router_cpu_us_per_token": medians,
        "http_over_grpc": round(medians["http"] / medians["grpc"], 3),
        "repeats": {name: [round(value, 1) for value in values] for name, values in found.items()},
    }
    options.output.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({"router_cpu_us_per_token": medians, "http_over_grpc": told["http_over_grpc"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
