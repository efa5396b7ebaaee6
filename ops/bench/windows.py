"""What sliding windows give back: requests that fit into one pool at once, and what cache groups cost the scheduler.

python -m ops.bench.windows            writes ops/bench/results/windows.json

The core is driven alone: requests of so many prompt tokens are admitted, computed in chunks and left answering until no
further one is admitted. "without" gives the same bytes to a model whose layers keep everything.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from ops.bench.core import NS_PER_STEP, RESULTS, measure, step
from ops.bench.machine import describe
from services.scheduler.core.phases import WaitReason
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from shared.cache_groups import Window, group_layers
from shared.sampling import Sampling, Stopping

POOL_BYTES = 16 * 2**30
BLOCK, BUDGET, MAX_NUM_SEQS = 16, 2048, 256
PROMPTS = (2_048, 8_192, 32_768, 131_072)
OUTPUT_TOKENS = 200_000


class Shape(msgspec.Struct, frozen=True):
    """The windows of a model's layers, and the bytes of K and V of one token in one layer (bfloat16)."""

    windows: tuple[Window, ...]
    layer_bytes: int


MODELS = {
    "Mistral-7B-v0.1, all windows of 4096": Shape((4096,) * 32, 2 * 8 * 128 * 2),
    "Gemma-2-9B, every other layer in a window of 4096": Shape((4096, None) * 21, 2 * 8 * 256 * 2),
    "Gemma-3-12B, five of six layers in a window of 1024": Shape(((1024,) * 5 + (None,)) * 8, 2 * 8 * 256 * 2),
}


def fits_at_once(windows: tuple[Window, ...], layer_bytes: int, prompt_tokens: int) -> int:
    """How many requests run when no further one is admitted."""
    groups = group_layers(windows)
    num_blocks = POOL_BYTES // (groups.layers * layer_bytes * BLOCK)
    core = Scheduler(CoreConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=BUDGET, enable_prefix_caching=False))
    spec = GroupSpec(
        id="g",
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET,
        windows=groups.windows,
    )
    core.add_group(spec, 0)
    tokens = tuple(range(prompt_tokens))
    for key in range(MAX_NUM_SEQS + 1):
        stopping = Stopping(max_tokens=min(OUTPUT_TOKENS, max(1, core.groups["g"].longest - prompt_tokens)))
        core.submit(Submission(key=key, token_ids=tokens, sampling=Sampling(seed=key), stopping=stopping), 0)
    most, group = 0, core.groups["g"]
    while core.requests:
        step(core, NS_PER_STEP)
        most = max(most, len(group.running))
        blocked = group.clock.reason in (WaitReason.BLOCKS, WaitReason.MAX_NUM_SEQS)
        if blocked and all(sample.planned >= prompt_tokens for sample in group.running):
            break
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "windows.json")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for name, shape in MODELS.items():
        groups = group_layers(shape.windows)
        everything = (None,) * len(shape.windows)
        figures[name] = {
            "groups": [window or 0 for window in groups.windows],
            "layers_per_group": groups.layers,
            "requests_at_once": {
                str(tokens): {
                    "with": fits_at_once(shape.windows, shape.layer_bytes, tokens),
                    "without": fits_at_once(everything, shape.layer_bytes, tokens),
                }
                for tokens in PROMPTS
            },
            "scheduler_64_rows": measure(64, options.repeats, groups.windows),
        }
    figures["scheduler_64_rows, one group without a window"] = measure(64, options.repeats)
    options.output.write_text(json.dumps({"machine": describe(), "pool_bytes": POOL_BYTES, **figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
