"""What structured requests cost the plain ones beside them: inter-token latency of the same plain streams, beside as
many plain ones and beside as many that follow a JSON schema, in turns on one cluster; and the CPU time of the worker
for the same number of tokens, which says more on a machine that others use too. Then, without a cluster, the time of
single steps of a worker's runner, in turns of a few milliseconds, which others hardly disturb.

`python -m ops.bench.structured`: results go to ops/bench/results/structured.json.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher

from ops.bench import machine
from ops.bench.cluster import Cluster
from ops.bench.model import ensure_model
from services.cli.client import Client, Delta, Request
from services.worker.load import load
from services.worker.plan import Admit, BlockTable, StepPlan
from shared.config import WorkerConfig
from shared.sampling import Sampling
from shared.structured import Structured
from shared.text.grammar import compile_grammar

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "ops" / "demo_model" / "model"
MIXED = ROOT / "build" / "bench-structured-model"
TOKENS = 96
FROM = 8
"""The first tokens are left out: prompts are computed and grammars compiled meanwhile."""
PROMPT = 64
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}
"""Never at an end within a run."""


def mixed_model(folder: Path) -> Path:
    """The benchmark's 213 M parameters behind the bundled tokenizer: 32,000 logits, of which 4,096 have tokens."""
    ensure_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    return folder


def requests_of(repeat: int, number: int, structured: bool) -> list[Request]:
    rng = random.Random(f"{repeat} {structured}")
    constraint = ("json_schema", json.dumps(SCHEMA)) if structured else None
    return [
        Request(
            token_ids=tuple(rng.randrange(10, 4096) for _ in range(PROMPT)),
            temperature=1.0,
            seed=i,
            max_tokens=TOKENS + 64,
            ignore_eos=constraint is None,
            structured=constraint,
        )
        for i in range(number)
    ]


async def latency_ms(client: Client, request: Request) -> float:
    """The mean time between its tokens, from the FROM-th to the TOKENS-th."""
    times: list[float] = []
    async for event in client.generate(request, timeout_s=600):
        if isinstance(event, Delta):
            times += [time.perf_counter()] * len(event.token_ids)
    return (times[TOKENS - 1] - times[FROM - 1]) / (TOKENS - FROM) * 1000


async def drain(client: Client, request: Request) -> None:
    async for _ in client.generate(request, timeout_s=600):
        pass


async def run_once(client: Client, repeat: int, number: int, *, structured: bool) -> float:
    """Mean latency of the plain streams, in milliseconds."""
    measured = requests_of(-1 - repeat, number, False)
    others = requests_of(repeat, number, structured)
    beside = [asyncio.create_task(drain(client, request)) for request in others]
    found = await asyncio.gather(*(latency_ms(client, request) for request in measured))
    await asyncio.gather(*beside)
    return statistics.mean(found)


async def compare(cluster: Cluster, number: int, repeats: int) -> dict[str, Any]:
    """Both ways in turns, one pair of runs before them not counted."""
    latency_ms: dict[str, list[float]] = {"plain": [], "structured": []}
    cpu_s: dict[str, list[float]] = {"plain": [], "structured": []}
    worker = cluster.pids["worker-0"]
    async with Client(cluster.address) as client:
        for repeat in range(-1, repeats):
            for way in ("plain", "structured") if repeat % 2 else ("structured", "plain"):
                before = machine.exact_cpu_seconds(worker)
                latency = await run_once(client, repeat, number, structured=way == "structured")
                if repeat >= 0:
                    latency_ms[way].append(round(latency, 3))
                    cpu_s[way].append(round(machine.exact_cpu_seconds(worker) - before, 4))
    return {"latency_ms": compared(latency_ms), "worker_cpu_s": compared(cpu_s)}


def compared(found: dict[str, list[float]]) -> dict[str, Any]:
    """Every value, and of the ratios of pairs the median and the quartiles."""
    ratios = [s / p for s, p in zip(found["structured"], found["plain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    quartiles = [round(low, 3), round(high, 3)]
    return {
        **{f"beside_{way}": values for way, values in found.items()},
        "ratio": round(middle, 3),
        "quartiles": quartiles,
    }


class Steps:
    """A worker's runner in this process. Of its three groups of rows a step has two: the measured plain ones, and as
    many plain or structured ones beside them."""

    def __init__(self, model: str, number: int, threads: int) -> None:
        config = WorkerConfig(
            model=model, threads=threads, max_num_seqs=3 * number, max_model_len=512, kv_cache_memory_bytes=2**30
        )
        self._loaded = load(config, lambda done, total: None)
        self._blocks_a_row = 512 // self._loaded.block_size
        self._known = [PROMPT] * 3 * number
        self._step = 0
        assert self._loaded.load_vocabulary is not None
        grammar = compile_grammar(Structured("json_schema", json.dumps(SCHEMA)), self._loaded.load_vocabulary())
        self._groups = {
            name: range(at * number, (at + 1) * number) for at, name in enumerate(("measured", "plain", "structured"))
        }
        for name, slots in self._groups.items():
            admits = [self._admit(slot, grammar if name == "structured" else None) for slot in slots]
            self._run(admits, slots, PROMPT)

    def take(self, way: str) -> float:
        """One step, in milliseconds."""
        return self._run([], [*self._groups["measured"], *self._groups[way]], 1)

    def _admit(self, slot: int, grammar: LLMatcher | None) -> Admit:
        rng = np.random.default_rng(slot)
        blocks = np.arange(self._blocks_a_row, dtype=np.int32) + slot * self._blocks_a_row
        return Admit(
            slot=slot,
            token_ids=rng.integers(10, 4096, PROMPT, dtype=np.int32),
            prompt_len=PROMPT,
            sampling=Sampling(seed=slot, temperature=1.0),
            stop_token_ids=np.empty(0, np.int64),
            tables=(BlockTable(0, blocks),),
            grammar=grammar,
        )

    def _run(self, admits: list[Admit], slots: Sequence[int], count: int) -> float:
        self._step += 1
        plan = StepPlan(
            step=self._step,
            exact=False,
            admits=tuple(admits),
            slots=np.asarray(slots, np.int64),
            counts=np.full(len(slots), count, np.int64),
            block_counts=np.zeros(len(slots), np.int64),
            samples=np.ones(len(slots), np.bool_),
            blocks=np.empty(0, np.int32),
        )
        began = time.perf_counter()
        self._loaded.runner.run(plan)
        return (time.perf_counter() - began) * 1e3


def compare_steps(model: str, number: int, repeats: int, threads: int) -> dict[str, Any]:
    """Medians, and their ratio; the first steps of each repeat are not counted."""
    found: dict[str, list[float]] = {"plain": [], "structured": []}
    for _ in range(repeats):
        steps = Steps(model, number, threads)
        for at in range(TOKENS):
            for way in ("plain", "structured") if at % 2 else ("structured", "plain"):
                taken = steps.take(way)
                if at >= FROM:
                    found[way].append(taken)
    plain, structured = (statistics.median(found[way]) for way in ("plain", "structured"))
    return {
        "beside_plain": round(plain, 3),
        "beside_structured": round(structured, 3),
        "ratio": round(structured / plain, 3),
    }


def measure(model: str, number: int, repeats: int, threads: int) -> dict[str, Any]:
    cluster = Cluster([f"--model={model}", f"--max-num-seqs={2 * number}", f"--threads={threads}"])
    try:
        with machine.OthersShare([cluster.process.pid]) as others:
            found = asyncio.run(compare(cluster, number, repeats))
    finally:
        cluster.close()
    steps = compare_steps(model, number, max(1, repeats // 3), threads)
    return {**found, "step_ms": steps, "others_cpu_share": round(others.share, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=8, help="plain streams, and others beside them")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "ops/bench/results/structured.json")
    options = parser.parse_args()
    models = {"bundled, 4,096 tokens": str(BUNDLED), "213 M, 32,000 logits": str(mixed_model(MIXED))}
    result = {
        **machine.describe(),
        "command": "python -m ops.bench.structured",
        "settings": {"number": options.number, "repeats": options.repeats, "threads": options.threads},
        "by_model": {
            name: measure(folder, options.number, options.repeats, options.threads) for name, folder in models.items()
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["by_model"]))


if __name__ == "__main__":
    main()
