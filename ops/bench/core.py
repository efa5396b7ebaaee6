"""The scheduler's core alone: steps per second with 1, 64 and 256 running requests, two plans in flight.

python -m ops.bench.core            writes ops/bench/results/core.json
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from ops.bench.machine import describe
from services.scheduler.core.plan import StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from shared.cache_groups import Window
from shared.sampling import Sampling, Stopping

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 64, 256)
PROMPT_TOKENS = 120
OUTPUT_TOKENS = 4_000
STEPS = 500
NS_PER_STEP = 1_000_000


def decoding(num_requests: int, windows: tuple[Window, ...] = (None,)) -> Scheduler:
    """A core whose requests have all left their prompts behind."""
    core = Scheduler(CoreConfig(max_num_seqs=256, max_num_batched_tokens=8192))
    num_blocks = 80_000 * len(windows)
    spec = GroupSpec(
        id="g", num_blocks=num_blocks, block_size=16, max_num_seqs=256, max_num_batched_tokens=8192, windows=windows
    )
    core.add_group(spec, 0)
    for i in range(num_requests):
        prompt = tuple((i * 131 + j * 7) % 32_000 for j in range(PROMPT_TOKENS))
        stopping = Stopping(max_tokens=OUTPUT_TOKENS, stop_token_ids=frozenset({2}))
        core.submit(Submission(key=i, token_ids=prompt, sampling=Sampling(seed=i), stopping=stopping), 0)
    for i in range(20):
        step(core, i * NS_PER_STEP)
    assert len(core.groups["g"].running) == num_requests
    return core


def step(core: Scheduler, now_ns: int) -> None:
    """Plan up to two ahead, absorb one result, take the events."""
    group = core.groups["g"]
    while len(group.in_flight) < 2 and core.schedule("g", now_ns) is not None:
        pass
    plan = group.in_flight[0].plan
    core.apply("g", StepResult(step=plan.step, tokens=[7] * sum(plan.samples), run_ns=NS_PER_STEP), now_ns)
    core.take_events()


def measure(num_requests: int, repeats: int, windows: tuple[Window, ...] = (None,)) -> dict[str, float]:
    """CPU milliseconds per step, the median of `repeats` runs of STEPS steps."""
    times = []
    for _ in range(repeats):
        core = decoding(num_requests, windows)
        began = time.process_time()
        for i in range(STEPS):
            step(core, i * NS_PER_STEP)
        times.append((time.process_time() - began) * 1e3 / STEPS)
    median = statistics.median(times)
    return {"ms_per_step": median, "best_ms_per_step": min(times), "steps_per_s": 1e3 / median}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "core.json")
    options = parser.parse_args()
    figures = {str(batch): measure(batch, options.repeats) for batch in BATCHES}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": describe(), "running_requests": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
