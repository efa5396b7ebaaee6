"""The whole system through gRPC at real shapes with random weights: `sluice up`, and clients in processes of their own.

Every case has a time limit and is recorded with what the services took meanwhile: steps, their mean time, the gaps
between them, and each process's CPU as a share of the wall. A case that fails is noted with the end of the cluster's
log; a cluster that no longer answers is given up with the cases that were left.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ops.bench.cluster import Cluster, ClusterError
from ops.bench.gpu import exactness as exact_requests
from ops.bench.gpu import soak as soaking
from ops.bench.gpu.clients import Answers, Clients, Stream, draw_ids, median_tpot_ms, steady_rate
from ops.bench.gpu.device import Device
from ops.bench.gpu.shapes import CASES_OF, config_of
from ops.bench.machine import cpu_seconds
from ops.bench.model import write_without_weights
from ops.bench.workload import Job, equal_lengths, long_tailed
from services.cli.client import Client

Figures = dict[str, Any]

MAX_MODEL_LEN = 4608
CONTEXT = 1024
WARM_UP_JOBS = 12
PROBE_LIMIT_S = 10.0
RECOVERY_S = 60
"""How long a cluster may stay silent after a case that failed."""
EXACT_SHARES = {0: 0, 10: 10, 100: 1}
"""Percent of requests → every so many-th one is exact."""
FULL_FROM_BYTES = 100 * 10**9
"""Below so much memory a run that cannot hold all its KV at once is left to whoever asks for it."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One running cluster, and who asks it."""

    device: Device
    cluster: Cluster
    clients: Clients
    vocab_size: int
    limit_s: float

    def run(self, jobs: Sequence[Job], limit_s: float = 0.0, at_once: int = 0) -> Answers:
        return self.clients.run(self.cluster.address, jobs, limit_s or self.limit_s, at_once)

    def job(self, seed: object, prompt: int, outputs: int, *, prefix: tuple[int, ...] = ()) -> Job:
        """A request of `prompt` tokens, those of `prefix` among them."""
        return Job(prefix + draw_ids(seed, prompt - len(prefix), self.vocab_size), outputs)


def decode(bench: Bench, batch: int) -> Figures:
    """`batch` requests at once whose context passes 1,024 while they decode together; small batches three times."""
    prompt, outputs = bench.device.size(CONTEXT - 64, 24), bench.device.size(128, 16)
    rates: list[float | None] = []
    for repeat in range(bench.device.size(3 if batch <= 64 else 1, 1)):
        answers = bench.run([bench.job(f"decode {batch} {row} {repeat}", prompt, outputs) for row in range(batch)])
        rates.append(_rounded(steady_rate(answers)))
    steady = [rate for rate in rates if rate is not None]
    if not steady:
        return {"error": "the first request had ended before the last one began: no steady rate", **_summary(answers)}
    return {"tokens_per_s": statistics.median(steady), "all_tokens_per_s": rates, **_summary(answers)}


def ttft(bench: Bench) -> Figures:
    """Idle: the time to the first token of a prompt of 1,024 and of 4,096, new and with 90 % of it cached."""
    figures: Figures = {}
    for length in (bench.device.size(1024, 48), bench.device.size(4096, 96)):
        fresh = _first_tokens(bench, [bench.job(f"ttft {length} {n}", length, 4) for n in range(5)])
        prefix = draw_ids(f"prefix {length}", length * 9 // 10 // 16 * 16, bench.vocab_size)
        _, *shared = _first_tokens(
            bench, [bench.job(f"shared {length} {n}", length, 4, prefix=prefix) for n in range(6)]
        )
        times = [statistics.median(ms for ms, _ in found) for found in (fresh, shared)]
        figures |= {
            f"idle_{length}_ms": round(times[0], 2),
            f"idle_{length}_all_ms": [round(ms, 2) for ms, _ in fresh],
            f"shared_{length}_ms": round(times[1], 2),
            f"shared_{length}_cached_tokens": [cached for _, cached in shared],
            f"gain_{length}": round(times[0] / times[1], 2),
        }
    return figures


def _first_tokens(bench: Bench, jobs: Sequence[Job]) -> list[tuple[float, int]]:
    """One after another: milliseconds to the first token, and cached prompt tokens."""
    streams = [bench.run([job]).streams[0] for job in jobs]
    return [((stream.first_s - stream.sent_s) * 1e3, stream.cached_tokens) for stream in streams]


def prefill(bench: Bench) -> Figures:
    """32 distinct prompts of 2,048 at once, one token out."""
    count, length = bench.device.size(32, 3), bench.device.size(2048, 40)
    answers = bench.run([bench.job(f"prefill {n}", length, 1) for n in range(count)])
    return {"prompt_tokens_per_s": _rounded(count * length / answers.wall_s), **_summary(answers)}


def tail(bench: Bench) -> Figures:
    """The long-tailed workload that the peers section gives to transformers, all at once."""
    answers = bench.run(long_tailed(bench.vocab_size, toy=bench.device.dry))
    return {"output_tokens_per_s": _rounded(answers.tokens / answers.wall_s), **_summary(answers)}


def equal(bench: Bench) -> Figures:
    """16 × 512/128 at once, as the peers section gives them to transformers in one static batch; the best of three."""
    prompt, outputs = bench.device.size(512, 24), bench.device.size(128, 6)
    runs = [bench.run(equal_lengths(bench.vocab_size, 16, prompt, outputs, seed=seed)) for seed in range(3)]
    answers = min(runs, key=lambda run: run.wall_s)
    return {"output_tokens_per_s": _rounded(answers.tokens / answers.wall_s), **_summary(answers)}


def exact(bench: Bench) -> Figures:
    """What exactness costs: 64 requests of 512 in and 64–256 out at once, of which none, every tenth and all are exact.
    A step that holds an exact request is exact for all."""
    rng, (low, high) = random.Random("exact"), (4, 8) if bench.device.dry else (64, 256)
    lengths = [rng.randint(low, high) for _ in range(bench.device.size(64, 4))]
    figures: Figures = {}
    for percent, each in EXACT_SHARES.items():
        jobs = [bench.job(f"exact {percent} {n}", bench.device.size(512, 24), out) for n, out in enumerate(lengths)]
        jobs = [Job(job.token_ids, job.max_tokens, each > 0 and n % each == 0) for n, job in enumerate(jobs)]
        answers = bench.run(jobs)
        figures[f"exact_{percent}_tokens_per_s"] = _rounded(answers.tokens / answers.wall_s)
    return {**figures, **_summary(answers)}


def exactness(bench: Bench) -> Figures:
    """Exact requests, each alone in its batch and then again among many: tokens and logprobs must be identical.
    `recomputed`: repeats that found nothing cached; `preemptions`: samples that went back into the queue meanwhile."""
    toy, begin = bench.device.dry, time.monotonic()
    before = _preemptions(bench)
    jobs = exact_requests.references(bench.vocab_size, toy=toy)
    alone = bench.run(jobs, _left_s(bench, begin), 1).streams
    if any(len(stream.logprobs) != stream.tokens for stream in alone):
        return {"error": "an answer came without the logprobs of all its tokens"}
    figures: Figures = {"requests": len(jobs), "mismatches": 0, "alone_s": round(time.monotonic() - begin, 2)}
    for at_once, count in (exact_requests.TOY_WAVES if toy else exact_requests.WAVES).items():
        mixed = exact_requests.wave(at_once, count, jobs, bench.vocab_size, toy=toy)
        try:
            answers = bench.run([job for _, job in mixed], _left_s(bench, begin), at_once)
        except RuntimeError as error:
            figures["error"] = f"{at_once} at once: {error}"
            break
        _compare(figures, at_once, [n for n, _ in mixed], answers, alone)
    if not figures.get("recomputed"):
        figures.setdefault("error", "no repeat computed its whole prompt again")
    if figures["mismatches"]:
        figures.setdefault("error", f"{figures['mismatches']} mismatches, the first: {figures['first_mismatch']}")
    return {**figures, "preemptions": _preemptions(bench) - before}


def _compare(figures: Figures, at_once: int, numbers: Sequence[int], answers: Answers, alone: Sequence[Stream]) -> None:
    """Adds one wave: `numbers` are those of the references, -1 of an ordinary request."""
    asked = [(n, stream) for n, stream in zip(numbers, answers.streams, strict=True) if n >= 0]
    differences = [(n, exact_requests.difference(stream, alone[n])) for n, stream in asked]
    wrong = [f"{at_once} at once, request {n}: {what}" for n, what in differences if what]
    if wrong:
        figures.setdefault("first_mismatch", wrong[0][:500])
    figures["requests"] += len(asked)
    figures["mismatches"] += len(wrong)
    figures["recomputed"] = figures.get("recomputed", 0) + sum(stream.cached_tokens == 0 for _, stream in asked)
    figures[f"{at_once}_at_once"] = {
        "requests": len(asked),
        "ordinary": len(numbers) - len(asked),
        "mismatches": len(wrong),
        "cached_tokens": sum(stream.cached_tokens for _, stream in asked),
        "wall_s": round(answers.wall_s, 2),
    }


def _left_s(bench: Bench, begin: float) -> float:
    """Of the case's time, which is twice the limit: many runs make one case."""
    return max(1.0, begin + 2 * bench.limit_s - time.monotonic())


def _preemptions(bench: Bench) -> int:
    """So far, for whatever reason."""
    told = scrape(bench.cluster.http["scheduler"])
    return int(sum(value for name, value in told.items() if name.startswith("sluice:num_preemptions_total")))


def soak(bench: Bench) -> Figures:
    """Requests of random shapes and kinds, some left by their clients, always as many in flight; none may fail."""
    seconds, toy = bench.device.size(20, 2), bench.device.dry
    shares = bench.clients.shares(bench.device.size(64, 4))
    address, vocab_size = bench.cluster.address, bench.vocab_size
    orders = [(address, seed, share, seconds, vocab_size, toy) for seed, share in enumerate(shares)]
    told: list[soaking.Soaked] = bench.clients.call(soaking.soak, orders, seconds + soaking.LAST_S)
    tokens, wall_s = sum(each.tokens for each in told), max(each.wall_s for each in told)
    figures: Figures = {
        **{name: sum(getattr(each, name) for each in told) for name in ("finished", "cancelled", "failed")},
        "tokens": tokens,
        "wall_s": round(wall_s, 2),
        "tokens_per_s": _rounded(tokens / (wall_s or 1.0)),
    }
    errors = [each.error for each in told if each.error]
    return {**figures, "error": f"{figures['failed']} failed, the first: {errors[0]}"} if errors else figures


def bulk(bench: Bench, count: int, outputs: int) -> Figures:
    """`count` requests of 1,024 in and `outputs` out, at once."""
    count, prompt = bench.device.size(count, 4), bench.device.size(1024, 24)
    outputs = bench.device.size(outputs, 8)
    limit_s = bench.limit_s * 2
    answers = bench.run([bench.job(f"bulk {count} {n}", prompt, outputs) for n in range(count)], limit_s)
    return {
        "requests": f"{count} x {prompt}/{outputs}",
        "output_tokens_per_s": _rounded(answers.tokens / answers.wall_s),
        **_summary(answers),
    }


def ragged(bench: Bench) -> Figures:
    """256 requests of 100–1,024 in and 100–1,024 out, at once."""
    rng, (low, high) = random.Random("ragged"), (8, 24) if bench.device.dry else (100, 1024)
    lengths = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(bench.device.size(256, 4))]
    answers = bench.run([bench.job(f"ragged {n}", *pair) for n, pair in enumerate(lengths)])
    return {"output_tokens_per_s": _rounded(answers.tokens / answers.wall_s), **_summary(answers)}


CASES: dict[str, Callable[[Bench], Figures]] = {
    "ttft": ttft,
    "decode-1": lambda bench: decode(bench, 1),
    "decode-16": lambda bench: decode(bench, bench.device.size(16, 2)),
    "decode-64": lambda bench: decode(bench, bench.device.size(64, 3)),
    "decode-256": lambda bench: decode(bench, bench.device.size(256, 4)),
    "prefill": prefill,
    "equal": equal,
    "tail": tail,
    "exact": exact,
    "exactness": exactness,
    "bulk": lambda bench: bulk(bench, 128, 256),
    "ragged": ragged,
    "full": lambda bench: bulk(bench, 256, 1024),
    "soak": soak,
}


def measure(device: Device, options: argparse.Namespace) -> Figures:
    """Every case of every shape, under `<shape> <case>`; beside the results lie the clusters' logs, and engine.json
    with every case that has ended."""
    device.release()
    found: Figures = {}
    with Clients(1 if device.dry else 4) as clients, tempfile.TemporaryDirectory() as folder:
        beside = options.out.parent if options.out else Path(folder)
        beside.mkdir(parents=True, exist_ok=True)

        def note(key: str, figures: Figures | bool) -> None:
            found[key] = figures
            (beside / "engine.json").write_text(json.dumps(found, indent=1))
            print(f"  {time.strftime('%H:%M:%S')} {key}: {json.dumps(figures)[:160]}", flush=True)
            if isinstance(figures, dict) and "log" in figures:
                print(figures["log"][-1000:], flush=True)

        for shape in options.engine_shapes[:1] if device.dry else options.engine_shapes:
            try:
                model = write_without_weights(Path(folder) / shape, config_of(shape, dry=device.dry))
                flags, log = _flags(device, model, options.engine_flags), beside / f"engine-{shape}.log"
                cluster = Cluster(flags, log=log, timeout_s=options.engine_start_s)
            except Exception as error:
                said = error.log if isinstance(error, ClusterError) else ""
                note(f"{shape} start", {"error": f"{type(error).__name__}: {error}", "log": said})
                continue
            try:
                vocab_size = config_of(shape, dry=device.dry)["vocab_size"]
                note(f"{shape} start", {"seconds": round(cluster.start_s, 1)})
                bench = Bench(device, cluster, clients, vocab_size, options.engine_case_s)
                _measure_shape(bench, options, shape, note)
            except Exception as error:
                note(f"{shape} given up", {"error": f"{type(error).__name__}: {error}", "log": cluster.log_tail()})
            finally:
                cluster.close(timeout_s=15)
    return found


def _measure_shape(
    bench: Bench, options: argparse.Namespace, shape: str, note: Callable[[str, Figures | bool], None]
) -> None:
    """Every case that is wanted, as long as the cluster answers and there is time."""
    wanted = options.engine_cases or _cases_of(shape, bench.device)
    deadline = time.monotonic() + options.engine_shape_s
    for name, case in {"warm-up": warm_up, **{name: CASES[name] for name in wanted}}.items():
        if time.monotonic() > deadline:
            note(f"{shape} {name}", {"error": f"not begun within {options.engine_shape_s:.0f} s"})
            continue
        figures = _run_case(bench, case)
        note(f"{shape} {name}", figures)
        if "error" in figures and not _answers(bench):
            note(f"{shape} given up", {"error": f"nothing answers after {name}", "log": bench.cluster.log_tail()})
            return
    end = _end(bench)
    note(f"{shape} end", end)
    note(f"{shape} none_compiled_late", none_compiled_late(end))
    note(f"{shape} blocks_back", _blocks_back(bench))


def _flags(device: Device, model: Path, extra: Sequence[str]) -> list[str]:
    sizes = {
        "max-num-seqs": device.size(256, 16),
        "max-num-batched-tokens": device.size(8192, 64),
        "max-model-len": device.size(MAX_MODEL_LEN, 256),
    }
    ports = [f"--{name}=0" for name in ("port", "scheduler-port", "worker-port", "metrics-port")]
    kind = ["--device=cpu", "--dtype=float32", "--threads=1"] if device.dry else ["--device=cuda", "--dtype=bfloat16"]
    loading = [f"--model={model}", "--load-format=dummy", "--shutdown-timeout=2", "--log-format=json"]
    return [*loading, *kind, *ports, *(f"--{name}={size}" for name, size in sizes.items()), *(f"--{e}" for e in extra)]


def _cases_of(shape: str, device: Device) -> list[str]:
    """The shape's own; the longest only where its KV fits."""
    too_small = not device.dry and torch.cuda.get_device_properties(0).total_memory < FULL_FROM_BYTES
    return [name for name in CASES_OF[shape] if name != "full" or not too_small]


def warm_up(bench: Bench) -> Figures:
    """Prompts and answers of several lengths, so that no case pays for what happens once."""
    jobs = [bench.job(f"warm {n}", 16 + bench.device.size(100, 2) * n, 8 + n) for n in range(WARM_UP_JOBS)]
    return _summary(bench.run(jobs))


def _run_case(bench: Bench, case: Callable[[Bench], Figures]) -> Figures:
    """The case's figures and what the services took meanwhile, or what stopped it."""
    before, begin = _taken(bench), time.perf_counter()
    try:
        figures = case(bench)
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}"[:600], "log": bench.cluster.log_tail()}
    wall = time.perf_counter() - begin
    after = _taken(bench)
    return {**figures, **_between(before, after, wall)}


def _taken(bench: Bench) -> dict[str, float]:
    """Counters so far: the scheduler's of steps, and every process's CPU seconds. Empty where a process is gone."""
    try:
        steps = {name: value for name, value in scrape(bench.cluster.http["scheduler"]).items() if "_seconds_" in name}
        return steps | {f"cpu {name}": cpu_seconds(pid) for name, pid in bench.cluster.pids.items()}
    except Exception:
        return {}


def _between(before: dict[str, float], after: dict[str, float], wall_s: float) -> Figures:
    """What happened between two readings: steps, their time and gaps, and CPU shares of the wall."""
    if not before or not after:
        return {}
    took = {name: after[name] - before.get(name, 0.0) for name in after}
    steps, gaps = took.get("sluice:step_seconds_count", 0.0), took.get("sluice:step_gap_seconds_count", 0.0)
    return {
        "steps": int(steps),
        "step_ms": round(took.get("sluice:step_seconds_sum", 0.0) * 1e3 / max(steps, 1), 3),
        "gap_ms": round(took.get("sluice:step_gap_seconds_sum", 0.0) * 1e3 / max(gaps, 1), 3),
        "cpu_share": {name[4:]: round(took[name] / wall_s, 2) for name in took if name.startswith("cpu ")},
    }


def scrape(address: str) -> dict[str, float]:
    """A service's metrics without the buckets of histograms: name with labels → value."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    parts = (line.rpartition(" ") for line in lines if line and not line.startswith("#") and "_bucket{" not in line)
    return {name: float(value) for name, _, value in parts}


def _answers(bench: Bench) -> bool:
    """Whether the cluster still does, or does again: a worker that died is started again."""
    deadline = time.monotonic() + bench.device.size(RECOVERY_S, 10)
    while bench.cluster.alive and time.monotonic() < deadline:
        try:
            bench.run([bench.job(f"probe {time.monotonic()}", 16, 2)], PROBE_LIMIT_S)
            return True
        except Exception:
            time.sleep(1)
    return False


def _end(bench: Bench) -> Figures:
    """What the services say of themselves when all is done."""
    names = [name for name in bench.cluster.http if name != "router"]
    try:
        return {name: scrape(bench.cluster.http[name]) for name in names}
    except Exception as error:
        return {"error": str(error), "log": bench.cluster.log_tail()}


def none_compiled_late(end: Figures) -> bool:
    """Whether every worker says of itself that no kernel was compiled in live traffic; false where none says so."""
    told = [service for name, service in end.items() if name.startswith("worker")]
    return bool(told) and all(service.get("sluice:late_compilations_total") == 0 for service in told)


def _blocks_back(bench: Bench) -> bool:
    """Whether no block is held any more, a moment after the last answer."""

    async def referenced() -> int:
        async with Client(bench.cluster.address) as client:
            load = await client.load()
            return load.requests_in_flight + sum(group.kv_blocks_referenced for group in load.groups)

    deadline = time.monotonic() + 5
    while (held := asyncio.run(referenced())) and time.monotonic() < deadline:
        time.sleep(0.2)
    return held == 0


def _summary(answers: Answers) -> Figures:
    """What every case tells of its answers."""
    first = [stream.first_s - stream.sent_s for stream in answers.streams]
    return {
        "wall_s": round(answers.wall_s, 3),
        "tokens": answers.tokens,
        "tpot_ms": _rounded(median_tpot_ms(answers)),
        "ttft_median_ms": round(statistics.median(first) * 1e3, 1),
        "deltas": sum(len(stream.arrivals) for stream in answers.streams),
        "client_cpu_share": [round(cpu_s / answers.wall_s, 2) for cpu_s in answers.client_cpu_s],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
