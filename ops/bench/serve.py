"""Sluice through gRPC and HTTP beside its peers, on one machine, in one run: interleaved repeats, medians, ratios.

`sh ops/scripts/bench` writes ops/bench/results/serve-<dtype>.json. Peers that are not installed are left out.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from ops.bench.cluster import Cluster, ClusterError
from ops.bench.completions import stream_completion
from ops.bench.machine import OthersShare, cpu_seconds, describe
from ops.bench.model import ensure_model
from ops.bench.workload import WORKLOADS, Job
from services.cli.client import Client, Delta, Finished, Request
from services.cli.ports import free_port
from services.worker.environment import worker_environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "ops" / "bench" / "results"
NOISY = 0.05
"""Above this share of the machine's CPU for others, a repeat is marked noisy and left out of the medians."""
IN_PROCESS = "in_process"
VLLM, VLLM_SERVER = "vllm", "vllm_server"
SERVER_START_S = 180
HTTP_SEEDS = 100_000
GREEDY = {"temperature": 0, "ignore_eos": True}
VLLM_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its fastest: no process of its own for the engine
}
PEERS = (IN_PROCESS, "hf_sequential", "hf_static", "hf_continuous")


class Ours:
    """A cluster of our own, started as a user would."""

    def __init__(self, model: Path, dtype: str, threads: int, extra: list[str]) -> None:
        flags = [f"--model={model}", f"--dtype={dtype}", f"--threads={threads}", "--max-num-seqs=16"]
        try:
            self._cluster = Cluster([*flags, "--max-model-len=1024", *extra])
        except ClusterError as error:
            raise SystemExit(str(error)) from None
        self.address, self.pids = self._cluster.address, self._cluster.pids
        self.over_http = HttpDoor(self._cluster.http["router"])

    def run(self, workload: str, seed: int) -> dict[str, float]:
        before = {name: cpu_seconds(pid) for name, pid in self.pids.items()}
        figures = asyncio.run(_measure(self.address, WORKLOADS[workload](seed)))
        for name, pid in self.pids.items():
            figures[f"cpu_s_{name.replace('-', '_')}"] = cpu_seconds(pid) - before[name]
        return figures

    def close(self) -> None:
        self._cluster.close()


class HttpDoor:
    """A server that runs already, asked by OpenAI's completions API."""

    def __init__(self, address: str, model: str = "") -> None:
        self._address, self._model = address, model

    def run(self, workload: str, seed: int) -> dict[str, float]:
        """With prompts of its own: what came through gRPC before has left its prompts in the cache."""
        return asyncio.run(_measure_http(self._address, WORKLOADS[workload](seed + HTTP_SEEDS), self._model))

    def close(self) -> None:
        pass


class VllmServer:
    """vLLM's own HTTP server, in processes of its own, with the Python that has vllm-cpu."""

    def __init__(self, model: Path, dtype: str, threads: int, python: str) -> None:
        port = free_port()
        command = [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--dtype={dtype}"]
        command += ["--max-model-len=1024", "--max-num-seqs=16", "--host=127.0.0.1", f"--port={port}"]
        environ = {**os.environ, **VLLM_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server keeps its engine in a process of its own
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=environ, stdin=quiet, stdout=quiet, stderr=quiet)
        self._door = HttpDoor(f"127.0.0.1:{port}", str(model))
        self._wait_until_it_answers()

    def run(self, workload: str, seed: int) -> dict[str, float]:
        return self._door.run(workload, seed)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + SERVER_START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self._door.run("a", -1)
                return
            except OSError:
                time.sleep(1)
        self.process.terminate()
        raise SystemExit("vLLM's server did not start")


class Peer:
    """Another way to answer, in a process of its own, fed line by line: transformers, vLLM, or our runner without gRPC.

    `python` is the interpreter to run it with: vLLM wants an environment of its own.
    """

    def __init__(self, model: Path, dtype: str, threads: int, way: str, python: str = sys.executable) -> None:
        self.way = way
        module = "ops.bench.in_process" if way == IN_PROCESS else "ops.bench.peers"
        command = [python, "-m", module, str(model), f"--dtype={dtype}", f"--threads={threads}"]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if way == IN_PROCESS:
            environ |= worker_environment(environ)
        elif way == VLLM:
            command.append("--engine=vllm")
            environ |= VLLM_ENVIRONMENT
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environ
        )
        self._read()

    def run(self, workload: str, seed: int) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps({"way": self.way, "workload": workload, "seed": seed}), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the peer {self.way} ended")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


async def _measure(address: str, jobs: list[Job]) -> dict[str, float]:
    """All jobs at once through gRPC: wall time, and for a single job TTFT and TPOT as its client sees them."""
    async with Client(address) as client:
        await client.connect(10)
        start = time.perf_counter()
        times = await asyncio.gather(*(_one(client, job) for job in jobs))
        wall = time.perf_counter() - start
    return _figures(start, wall, times, jobs)


async def _measure_http(address: str, jobs: list[Job], model: str) -> dict[str, float]:
    """As _measure, over HTTP. `model`: the name to ask for; empty: none."""
    named = {"model": model} if model else {}
    start = time.perf_counter()
    asked = [{"prompt": list(job.token_ids), "max_tokens": job.max_tokens, **GREEDY, **named} for job in jobs]
    answers = await asyncio.gather(*(stream_completion(address, ask) for ask in asked))
    wall = time.perf_counter() - start
    assert [answer.tokens for answer in answers] == [job.max_tokens for job in jobs]
    return _figures(start, wall, [(answer.first_s, answer.last_s) for answer in answers], jobs)


def _figures(start: float, wall: float, times: list[tuple[float, float]], jobs: list[Job]) -> dict[str, float]:
    first, last = times[0]
    figures = {"wall_s": wall, "mean_ttft_ms": statistics.mean(t[0] - start for t in times) * 1e3}
    if len(jobs) == 1:
        figures |= {"ttft_ms": (first - start) * 1e3, "tpot_ms": (last - first) * 1e3 / (jobs[0].max_tokens - 1)}
    return figures


async def _one(client: Client, job: Job) -> tuple[float, float]:
    request = Request(token_ids=job.token_ids, max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
    moments: list[float] = []
    tokens = 0
    async for event in client.generate(request, timeout_s=600):
        if isinstance(event, Delta):
            moments.append(time.perf_counter())
            tokens += len(event.token_ids)
        elif isinstance(event, Finished):
            assert event.reason == "length", event
    assert tokens == job.max_tokens, (tokens, job.max_tokens)
    return moments[0], moments[-1]


def measure(runners: dict[str, Any], workloads: list[str], repeats: int) -> list[dict[str, Any]]:
    """Every runner on every workload, in turn, `repeats` times; one warm-up each before."""
    for runner in runners.values():
        runner.run("a", 10_000)
    rows = []
    for repeat in range(repeats):
        for workload in workloads:
            for name, runner in runners.items():
                _let_run(runner, runners)
                pids = [os.getpid()]  # everything that we started descends from here
                with OthersShare(pids) as others:
                    figures = runner.run(workload, repeat)
                rows.append({"who": name, "workload": workload, "repeat": repeat, "others": others.share, **figures})
                print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}))
                sys.stdout.flush()
    return rows


def _let_run(chosen: Any, runners: dict[str, Any]) -> None:
    """Stops the processes of all other peers: some look for work all the time, and take the chosen one's cores."""
    for runner in runners.values():
        if process := getattr(runner, "process", None):
            signum = signal.SIGCONT if runner is chosen else signal.SIGSTOP
            for each in (parent := psutil.Process(process.pid)), *parent.children(recursive=True):
                each.send_signal(signum)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by runner and workload, and the ratios that goals.md asks for."""
    summary: dict[str, Any] = {}
    for who, workload in sorted({(row["who"], row["workload"]) for row in rows}):
        own = [row for row in rows if (row["who"], row["workload"]) == (who, workload) and "error" not in row]
        quiet = [row for row in own if row["others"] <= NOISY] or own
        if not quiet:
            continue
        numbers = {key for row in quiet for key in row if key not in ("who", "workload", "repeat")}
        medians = {key: statistics.median(row[key] for row in quiet) for key in sorted(numbers)}
        summary.setdefault(workload, {})[who] = {**medians, "repeats": len(quiet), "noisy": len(own) - len(quiet)}
    for workload, by_who in summary.items():
        base = by_who.get("hf_sequential")
        for figures in by_who.values() if base else ():
            figures["times_hf_sequential"] = base["wall_s"] / figures["wall_s"]
        if IN_PROCESS in by_who and "sluice" in by_who:
            by_who["sluice"]["in_process_over_grpc_wall"] = by_who[IN_PROCESS]["wall_s"] / by_who["sluice"]["wall_s"]
        _add_cpu(by_who.get("sluice"), sum(job.max_tokens for job in WORKLOADS[workload](0)))
    return summary


def _add_cpu(ours: dict[str, float] | None, output_tokens: int) -> None:
    """What router and scheduler cost: per output token, and as a share of the worker's time."""
    if ours is None:
        return
    edge = ours["cpu_s_router"] + ours["cpu_s_scheduler"]
    workers = sum(value for key, value in ours.items() if key.startswith("cpu_s_worker"))
    ours["output_tokens_per_s"] = output_tokens / ours["wall_s"]
    ours["edge_cpu_ms_per_token"] = edge * 1e3 / output_tokens
    ours["grpc_over_in_process_by_cpu"] = workers / (workers + edge)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", default="a,b,c")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of " + ", ".join(PEERS))
    parser.add_argument(
        "--vllm-python", help="the Python of an environment that has vllm-cpu; adds its engine and its server as peers"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("up_flags", nargs="*", help="flags for `sluice up`, after --")
    options = parser.parse_args()
    model = ensure_model(ROOT / "build" / f"bench-model-{options.dtype}", options.dtype)
    if options.vllm_python and shutil.which(options.vllm_python) is None:
        parser.error(f"--vllm-python: {options.vllm_python} cannot be run; name the Python that has vllm-cpu")
    runners: dict[str, Any] = {}
    try:
        runners["sluice"] = Ours(model, options.dtype, options.threads, options.up_flags)
        runners["sluice_http"] = runners["sluice"].over_http
        for way in filter(None, options.peers.split(",")):
            runners[way] = Peer(model, options.dtype, options.threads, way)
        if options.vllm_python:
            runners[VLLM] = Peer(model, options.dtype, options.threads, VLLM, options.vllm_python)
            runners[VLLM_SERVER] = VllmServer(model, options.dtype, options.threads, options.vllm_python)
        rows = measure(runners, options.workloads.split(","), options.repeats)
    finally:
        for runner in runners.values():
            _let_run(runner, {"": runner})
            runner.close()
    summary = summarize(rows)
    result = {"machine": describe(), "dtype": options.dtype, "threads": options.threads, "summary": summary}
    output = options.output or RESULTS / f"serve-{options.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**result, "runs": rows}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
