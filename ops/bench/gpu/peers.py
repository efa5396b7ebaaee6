"""transformers on the same card at Llama-3.1-8B's shape with random weights: eager and with a static cache and
torch.compile, in static batches, and its continuous batching. Each case is a process of its own with a time limit,
which prints every figure as it has it.

    python -m ops.bench.gpu.peers compiled --warm     only compiles, so that a later run finds all of it on disk
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ops.bench.gpu.device import Device
from ops.bench.gpu.options import PEER_CASES
from ops.bench.gpu.shapes import config_of
from ops.bench.peers import continuous, sequential, static
from ops.bench.workload import Job, equal_lengths, long_tailed

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parents[3]
SHAPE = "llama-3.1-8b"
BATCH = 16
CACHE_TOKENS = 1152
"""Of the static cache, in every call: another length would be compiled again."""
STATIC_CACHE = {"cache_implementation": "static", "max_cache_len": CACHE_TOKENS}


def measure(device: Device, options: argparse.Namespace) -> Figures:
    """Every case's figures, under `<case> <workload>`."""
    device.release()
    together = [options.peer_cases] if device.dry else [[case] for case in options.peer_cases]
    found: Figures = {}
    for cases in together:
        figures = _run(cases, device, options.peer_s)
        print(json.dumps(figures), flush=True)
        found |= figures
    return found


def _run(cases: Sequence[str], device: Device, limit_s: float) -> Figures:
    """Of one process: the lines that it printed, also where it failed or its time was up."""
    command = [sys.executable, "-m", "ops.bench.gpu.peers", *cases, *(["--dry-run"] if device.dry else [])]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, env=environ, start_new_session=True)
        try:
            how = f"exit code {code}" if (code := process.wait(limit_s)) else ""
        except subprocess.TimeoutExpired:
            how = f"not done within {limit_s:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # compilers are processes of their own
        process.wait()
        output.seek(0)
        errors.seek(0)
        found: Figures = {}
        for line in output.read().splitlines():
            if line.startswith('{"'):
                found |= json.loads(line)
        return found | ({f"{' '.join(cases)} all": {"error": how, "log": errors.read()[-3000:]}} if how else {})


def eager(model: Any, dry: bool) -> Iterator[tuple[str, Figures]]:
    """generate() as it is: one stream, then static batches."""
    yield from _static_batches(model, dry)


def compiled(model: Any, dry: bool) -> Iterator[tuple[str, Figures]]:
    """The same with a static cache, which makes generate() compile its decode step on a GPU."""
    yield from _static_batches(model, dry, **STATIC_CACHE)


def _static_batches(model: Any, dry: bool, **generate: Any) -> Iterator[tuple[str, Figures]]:
    """The dearest to lose first, should the time be up."""
    equal, tail, one = _workloads(model.config.vocab_size, dry)

    def best(run: Callable[..., Figures], jobs: list[Job]) -> Figures:
        """Of two: a new cache may make the first one capture its graphs again."""
        _warm(model, jobs, dry, **generate)
        return min((run(model, jobs, **generate) for _ in range(1 if dry else 2)), key=lambda took: took["wall_s"])

    yield "equal", _rate(equal, [best(static, equal)])
    yield "tail", _rate(list(chain(*tail)), [static(model, batch, **generate) for batch in tail])
    yield "batch 1", best(sequential, one)


def _workloads(vocab_size: int, dry: bool) -> tuple[list[Job], list[list[Job]], list[Job]]:
    """`equal`, the batches of `tail`, and `batch 1`."""
    tail = long_tailed(vocab_size, toy=dry)
    return (
        equal_lengths(vocab_size, BATCH, *((24, 4) if dry else (512, 128))),
        [tail[start : start + BATCH] for start in range(0, len(tail), BATCH)],
        equal_lengths(vocab_size, 1, *((24, 4) if dry else (1024, 128))),
    )


def _warm(model: Any, jobs: list[Job], dry: bool, **generate: Any) -> None:
    """Compiles for this batch size alone, and runs it."""
    if model.__dict__.pop("_compiled_call", None) is not None:
        torch.compiler.reset()  # a second batch size would otherwise be compiled for any, and be slower
    for _ in range(1 if dry else 2):
        static(model, _shortened(jobs, dry), **generate)


def _shortened(jobs: list[Job], dry: bool) -> list[Job]:
    return [Job(job.token_ids, 4 if dry else 8) for job in jobs]


def fill_caches(model: Any, dry: bool) -> Figures:
    """What `compiled` does, in its order and shapes but a few tokens each: its compilations stay on disk for a later
    process."""
    begin = time.perf_counter()
    equal, tail, one = _workloads(model.config.vocab_size, dry)
    _warm(model, equal, dry, **STATIC_CACHE)
    for batch in tail:
        static(model, _shortened(batch, dry), **STATIC_CACHE)
    _warm(model, one, dry, **STATIC_CACHE)
    return {"wall_s": time.perf_counter() - begin}


def in_continuous_batches(model: Any, dry: bool) -> Iterator[tuple[str, Figures]]:
    """Its continuous batching; without flash-attention, which would have to be fetched, by SDPA."""
    from transformers import ContinuousBatchingConfig

    model.set_attn_implementation("paged|sdpa")
    batching = None if dry else ContinuousBatchingConfig()
    jobs = long_tailed(model.config.vocab_size, toy=dry)
    yield "tail", _rate(jobs, [continuous(model, jobs, batching)])


def _rate(jobs: Sequence[Job], runs: Sequence[Figures]) -> Figures:
    """Tokens that were asked for, a second: what a padded batch computes beyond them counts for nothing."""
    wall_s, tokens = sum(run["wall_s"] for run in runs), sum(job.max_tokens for job in jobs)
    return {"wall_s": wall_s, "tokens": tokens, "batches": len(runs), "output_tokens_per_s": tokens / wall_s}


def _rounded(figures: Figures) -> Figures:
    return {key: round(value, 3) for key, value in figures.items()}


CASES: dict[str, Callable[[Any, bool], Iterator[tuple[str, Figures]]]] = {
    "eager": eager,
    "compiled": compiled,
    "continuous": in_continuous_batches,
}


def build(dry: bool) -> Any:
    """The model, its weights drawn where they are needed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = config_of(SHAPE, dry=dry)
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    with torch.device("cpu" if dry else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", choices=PEER_CASES)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--warm", action="store_true", help="only fill the caches of torch.compile; with compiled alone"
    )
    options = parser.parse_args()
    if options.warm and options.cases != ["compiled"]:
        parser.error("--warm goes with the case compiled, and with no other")
    torch.manual_seed(0)
    model = build(options.dry_run)
    if options.warm:
        print(json.dumps({"compiled warmed": _rounded(fill_caches(model, options.dry_run))}), flush=True)
        return 0
    failed = 0
    for case in options.cases:
        try:
            for name, figures in CASES[case](model, options.dry_run):
                print(json.dumps({f"{case} {name}": _rounded(figures)}), flush=True)
        except Exception as error:  # the next case may still work
            print(json.dumps({f"{case} failed": {"error": f"{type(error).__name__}: {error}"[:1500]}}), flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
