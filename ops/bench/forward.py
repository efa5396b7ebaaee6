"""The decoder alone, in process: milliseconds of one forward and where they go. Steers kernels/cpu.

    python -m ops.bench.forward [--threads 2] [--dtype bfloat16] [--repeats 30] [--case decode-16]

Prints one JSON object. `ms` is the median of forwards without instruments, `best_ms` their 10th percentile (the one
to look at beside a busy neighbour); `parts_ms` are medians from separate forwards with a clock around each operation.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ops.bench.machine import OthersShare, describe
from ops.bench.model import CONFIG
from services.worker.layers import attention as attention_layer
from services.worker.layers import linear as linear_layer
from services.worker.layers import norm as norm_layer
from services.worker.memory.layout import layout_of
from services.worker.memory.pool import allocate_pool
from services.worker.models import decoder as decoder_module
from services.worker.models.decoder import Decoder, StepBatch, random_decoder

OPERATIONS: list[tuple[Any, str]] = [
    (attention_layer, "rotate_and_write"),
    (attention_layer, "paged_attention"),
    (linear_layer, "linear"),
    (linear_layer, "linear_add"),
    (linear_layer, "gated_linear"),
    (norm_layer, "rms_norm"),
    (decoder_module, "plan_attention"),
]

CASES: dict[str, list[tuple[int, int]]] = {
    "decode-1": [(1, 192)],
    "decode-4": [(1, 192)] * 4,
    "decode-16": [(1, 64 + 30 * row) for row in range(16)],
    "decode-16-equal": [(1, 512)] * 16,
    "prefill-128": [(128, 128)],
    "prefill-512": [(512, 512)],
    "prefill-4x128": [(128, 128)] * 4,
    "chunk-256-after-256": [(256, 512)],
    "mixed-12-decode-500-prompt": [(1, 64 + 30 * row) for row in range(12)] + [(250, 250), (250, 250)],
}
"""(new tokens, context with them) of each row."""


def build_batch(
    rows: list[tuple[int, int]], block_size: int, *, exact: bool = False, vocab_size: int = CONFIG["vocab_size"]
) -> StepBatch:
    """Rows of (new tokens, context with them) whose blocks lie scattered over the pool; on the host. For models of one
    cache group."""
    counts = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    positions, slots, starts = [], [], [0]
    for row, (new, context) in enumerate(rows):
        tables[row, : counts[row]] = order[row]
        position = torch.arange(context - new, context)
        positions.append(position)
        slots.append(order[row][position // block_size] * block_size + position % block_size)
        starts.append(starts[-1] + new)
    return StepBatch(
        token_ids=torch.randint(0, vocab_size, (starts[-1],), generator=torch.Generator().manual_seed(1)),
        positions=torch.cat(positions),
        slots=torch.cat(slots)[None],
        query_starts=starts,
        context_lens=[context for _, context in rows],
        block_tables=tables[None],
        logit_rows=torch.tensor(starts[1:]) - 1,
        exact=exact,
    )


def measure(decoder: Decoder, batch: StepBatch, pool: torch.Tensor, repeats: int) -> dict[str, Any]:
    def forward() -> float:
        begin = time.perf_counter()
        decoder.forward(batch, pool)
        return (time.perf_counter() - begin) * 1e3

    forward()
    with OthersShare([os.getpid()]) as others:
        times = sorted(forward() for _ in range(repeats))
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(max(3, repeats // 3)):
        with clocks() as spent:
            forward()
        for name, ms in spent.items():
            parts[name].append(ms)
    return {
        "ms": round(statistics.median(times), 3),
        "best_ms": round(times[len(times) // 10], 3),
        "others_share": round(others.share, 3),
        "parts_ms": {name: round(statistics.median(values), 3) for name, values in sorted(parts.items())},
    }


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Puts a clock around each operation for as long as the block lasts; milliseconds by name."""
    spent: dict[str, float] = defaultdict(float)
    originals = [(module, name, getattr(module, name)) for module, name in OPERATIONS]
    try:
        for module, name, original in originals:
            setattr(module, name, _clocked(original, name, spent))
        yield spent
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _clocked(operation: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = operation(*args, **kwargs)
        spent[name] += (time.perf_counter() - begin) * 1e3
        return result

    return clocked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--case", action="append", choices=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    decoder = random_decoder(CONFIG, dtype)
    pool = allocate_pool(layout_of(decoder.spec, dtype, options.block_size), 600).pages.normal_()
    results = {}
    for case in options.case or CASES:
        batch = build_batch(CASES[case], options.block_size, exact=options.exact)
        results[case] = measure(decoder, batch, pool, options.repeats)
    settings = {key: value for key, value in vars(options).items() if key != "case"}
    print(json.dumps({**describe(), **settings, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
