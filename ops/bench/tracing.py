"""What tracing every request costs router and scheduler: CPU milliseconds per output token, with and without.

    python -m ops.bench.tracing [--pairs 10]        writes ops/bench/results/tracing.json

One cluster of the bundled model answers the same requests in turn with and without: their callers say by `traceparent`
whether they are sampled, as the default sampler honours it. So both ways run in the same processes, second by second,
and what disturbs this machine disturbs both alike; the collector is another process and not counted. A second cluster
exports to a collector that is dead. `alone` times the work by itself: building a trace, which is done for every request
(`sluice trace` shows the last ones), and encoding it as the exporter does, which is done for sampled ones.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ops.bench.machine import OthersShare, describe, exact_cpu_seconds
from services.cli.client import Client, Finished, Request
from services.router.answer import Answer
from services.router.fleet.values import Durations, Placed, Release, Segment
from services.router.life import Life
from services.router.request import GenerateOptions
from shared.config.otel import ExportConfig
from shared.outcome import FinishReason
from shared.sampling import Sampling
from shared.telemetry.context import Sampler, begin
from shared.telemetry.otlp import encode
from shared.telemetry.spans import Trace
from shared.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "ops" / "bench" / "results"
BUNDLED = ROOT / "ops" / "demo_model" / "model"
STREAMS = 16
TOKENS = 128
START_TIMEOUT_S = 120.0
SAMPLER = "parentbased_always_on"
DEAD = "http://127.0.0.1:9"
COLLECTOR = """
from concurrent import futures
import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer, add_TraceServiceServicer_to_server)
class Collector(TraceServiceServicer):
    def Export(self, request, context):
        return pb.ExportTraceServiceResponse()
server = grpc.server(futures.ThreadPoolExecutor(1))
add_TraceServiceServicer_to_server(Collector(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
"""


@contextmanager
def collector() -> Iterator[str]:
    """Where a collector listens that forgets what it gets."""
    with subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@contextmanager
def cluster(endpoint: str) -> Iterator[dict[str, Any]]:
    """What the ready file of a cluster says: the router's address and every service's pid."""
    with tempfile.TemporaryDirectory(prefix="sluice-tracing-") as folder:
        ready = Path(folder) / "ready.json"
        flags = ["--grpc-port=0", f"--ready-file={ready}", "--threads=1", f"--max-num-seqs={STREAMS}"]
        flags.append(f"--otlp-traces-endpoint={endpoint}")
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "up", *flags],
            cwd=ROOT, stdin=null, stdout=null, stderr=null, env={**os.environ, "OTEL_TRACES_SAMPLER": SAMPLER},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the cluster did not start")
                time.sleep(0.1)
            yield json.loads(ready.read_text())
        finally:
            process.terminate()
            process.wait(60)


async def _ask(address: str, seed: int, sampled: bool) -> None:
    """STREAMS requests of TOKENS tokens at once."""

    async def one(client: Client, index: int) -> None:
        request = Request(prompt=f"def f{seed}_{index}(", max_tokens=TOKENS, seed=index, ignore_eos=True)
        caller = f"00-{seed + 1:032x}-{index + 1:016x}-0{int(sampled)}"
        async for event in client.generate(request, timeout_s=120, metadata=(("traceparent", caller),)):
            if isinstance(event, Finished):
                assert event.reason == "length", event

    async with Client(address) as client:
        await asyncio.gather(*(one(client, index) for index in range(STREAMS)))


def burst(ready: dict[str, Any], sampled: bool, seed: int) -> tuple[float, float]:
    """Seconds of router's and scheduler's CPU, and of the clock, for one request of every stream."""
    pids = [ready["pids"]["router"], ready["pids"]["scheduler"]]
    before, began = sum(map(exact_cpu_seconds, pids)), time.perf_counter()
    asyncio.run(_ask(ready["router"], seed, sampled))
    wall_s = time.perf_counter() - began
    return sum(map(exact_cpu_seconds, pids)) - before, wall_s


def run_pair(ways: dict[str, tuple[dict[str, Any], bool]], pair: int, rounds: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds per output token and tokens a second of each way, from bursts in turn."""
    spent = {way: [0.0, 0.0] for way in ways}
    for round_ in range(rounds):
        for way in list(ways) if (pair + round_) % 2 else list(ways)[::-1]:
            for index, seconds in enumerate(burst(*ways[way], pair * 1000 + round_)):
                spent[way][index] += seconds
    tokens = STREAMS * TOKENS * rounds
    return {
        way: {"cpu_ms_per_token": cpu_s * 1e3 / tokens, "tokens_per_s": tokens / wall_s}
        for way, (cpu_s, wall_s) in spent.items()
    }


def measure_alone(traces: int = 2_000, batch: int = 16) -> dict[str, float]:
    """CPU microseconds of one request's trace: to build it when the request ends, and to encode and serialize it."""
    life, options = _example()

    def build() -> Trace:
        return life.trace(options, instance="router", end="answered", now_ns=900_000_000, wall_ns=10**18)

    def timed(work: Callable[[], object], count: int) -> float:
        work()
        began = time.process_time()
        for _ in range(count):
            work()
        return (time.process_time() - began) * 1e6 / count

    made, config = [build() for _ in range(batch)], ExportConfig(endpoint="nowhere")
    encode_us = timed(lambda: encode(made, config).SerializeToString(), traces // batch) / batch
    return {"build_us": timed(build, traces), "encode_us": encode_us, "spans": len(made[0].spans)}


def _example() -> tuple[Life, GenerateOptions]:
    """A request as most are: answered, never preempted."""
    options = GenerateOptions(request_id="example", model="bundled", sampling=Sampling(seed=1))
    segments = (
        Segment(phase="queue", ns=1_000_000, reason_ns={"budget": 1_000_000}),
        Segment(phase="prefill", ns=20_000_000, steps=1, rows=16, device_ns=19_000_000),
        Segment(phase="decode", ns=800_000_000, steps=127, rows=2_032, device_ns=700_000_000),
    )
    durations = Durations(total_ns=821_000_000, segments=segments)
    tokenizer = load_tokenizer(BUNDLED)
    answer = Answer(options, (1, 2, 3), tokenizer.texts, None, 2**20, lambda: 890_000_000)
    answer.on_end(0, FinishReason.LENGTH, -1)
    answer.on_release(Release(durations=durations))
    placed = Placed(target="s", scheduler="s", overlap_tokens=0, candidates=("s",), costs=(3,))
    context = begin(None, Sampler(), random.Random(1))
    times = {"admitted": 10_000, "tokenized": 200_000, "submitted": 300_000, "first_token": 30_000_000}
    return Life(0, "text_completion", context, placed=placed, answer=answer, **times), options


def measure(pairs: int, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        live = stack.enter_context(cluster(stack.enter_context(collector())))
        dead = stack.enter_context(cluster(DEAD))
        ways = {"off": (live, False), "on": (live, True), "dead_off": (dead, False), "dead_on": (dead, True)}
        for ready, sampled in ways.values():
            burst(ready, sampled, 999_999)
        rows: list[dict[str, Any]] = []
        for pair in range(pairs):
            with OthersShare([os.getpid()]) as others:
                row = run_pair(ways, pair, rounds)
            rows.append({**row, "others": others.share})
            print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows, "summary": summarize(rows)}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the ratio of sampled to unsampled pair by pair: its median and its quartiles."""
    summary: dict[str, Any] = {}
    for on, off in (("on", "off"), ("dead_on", "dead_off")):
        ratios = sorted(row[on]["cpu_ms_per_token"] / row[off]["cpu_ms_per_token"] for row in rows)
        speeds = [row[on]["tokens_per_s"] / row[off]["tokens_per_s"] for row in rows]
        summary[on] = {
            "cpu_ms_per_token": statistics.median(row[on]["cpu_ms_per_token"] for row in rows),
            "cpu_ms_per_token_off": statistics.median(row[off]["cpu_ms_per_token"] for row in rows),
            "over_off": statistics.median(ratios),
            "over_off_quartiles": [ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]],
            "tokens_per_s_over_off": statistics.median(speeds),
        }
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12, help=f"a pair, of {STREAMS} streams with {TOKENS} tokens")
    parser.add_argument("--output", type=Path, default=RESULTS / "tracing.json")
    options = parser.parse_args()
    alone = measure_alone()
    found = {"alone": alone, **measure(options.pairs, options.rounds)} if options.pairs else {"alone": alone}
    options.output.write_text(json.dumps({"machine": describe(), **found}, indent=1) + "\n")
    print(json.dumps({"alone": alone, **found.get("summary", {})}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
