"""Our own core and runner in one process, without gRPC, router or processes: what the services are compared with.

Reads a JSON line {"workload", "seed"} at a time, answers one with figures.
"""

import argparse
import json
import sys
import time

import msgspec

from ops.bench.workload import WORKLOADS, Job
from services.scheduler.core.plan import StepResult
from services.scheduler.core.request import Submission
from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.core.worker_group import GroupSpec
from services.scheduler.wire import plan_message
from services.worker.host import Loaded
from services.worker.load import load
from services.worker.wire import plan_from_message
from shared.config import WorkerConfig
from shared.sampling import Sampling, Stopping

GROUP = "in-process"


def core_of(loaded: Loaded) -> Scheduler:
    core = Scheduler(CoreConfig(max_num_seqs=loaded.max_num_seqs))
    spec = GroupSpec(
        id=GROUP,
        num_blocks=loaded.num_blocks,
        block_size=loaded.block_size,
        max_num_seqs=loaded.max_num_seqs,
        max_num_batched_tokens=loaded.max_num_batched_tokens,
        max_model_len=loaded.max_model_len,
        windows=loaded.windows,
    )
    core.add_group(spec, time.monotonic_ns())
    return core


def answer(core: Scheduler, loaded: Loaded, jobs: list[Job], seed: int) -> dict[str, float]:
    """All jobs at once: plan, run, absorb, until everything is released."""
    began = time.perf_counter()
    for i, job in enumerate(jobs):
        sampling, stopping = Sampling(seed=0, temperature=0.0), Stopping(max_tokens=job.max_tokens)
        submission = Submission(key=(seed, i), token_ids=job.token_ids, sampling=sampling, stopping=stopping)
        core.submit(submission, time.monotonic_ns())
    first = 0.0
    while core.requests:
        plan = core.schedule(GROUP, time.monotonic_ns())
        assert plan is not None
        output = loaded.runner.run(plan_from_message(plan_message(plan).plan, {}))
        core.apply(GROUP, StepResult(step=plan.step, tokens=output.tokens.tolist()), time.monotonic_ns())
        if core.take_events() and not first:
            first = time.perf_counter()
    wall = time.perf_counter() - began
    figures = {"wall_s": wall}
    if len(jobs) == 1:
        figures["ttft_ms"] = (first - began) * 1e3
        figures["tpot_ms"] = (began + wall - first) * 1e3 / (jobs[0].max_tokens - 1)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = WorkerConfig(
        model=options.model, dtype=options.dtype, threads=options.threads, max_num_seqs=16, max_model_len=1024
    )
    loaded = load(config, lambda done, total: None)
    core = core_of(loaded)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = msgspec.json.decode(line)
        jobs = WORKLOADS[order["workload"]](order["seed"])
        print(json.dumps(answer(core, loaded, jobs, order["seed"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
