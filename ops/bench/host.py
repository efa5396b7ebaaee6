"""The host path against a pretend device: a scheduler and a worker, each its own process, talking through gRPC.

python -m ops.bench.host            writes ops/bench/results/host.json

The worker's device takes the floor time of a step (pretend_gpu.py), so what it waits for is our own doing. One link, as
a router holds it, submits a batch that decodes throughout; of its frames nothing is read but their number.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import psutil

from ops.bench.machine import OthersShare, cpu_seconds, describe
from ops.bench.pretend_gpu import FLOORS_MS, Step, run_loop, serve_worker
from services.scheduler.app import serve
from shared import PROTOCOL_VERSION
from shared.clock import NS_PER_MS, monotonic_ns
from shared.config import SchedulerConfig
from shared.rpc.sluice.v1 import scheduling_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2_grpc as rpc

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 32
WARM_UP_STEPS = 40
START_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 20.0


def serve_scheduler(pipe: Connection, max_num_seqs: int) -> None:
    """A process: sends its address, serves until SIGTERM."""
    config = SchedulerConfig(
        port=0, metrics_port=0, max_num_seqs=max_num_seqs, max_num_batched_tokens=8192, shutdown_timeout=0,
        log_format="json",
    )  # fmt: skip
    run_loop(serve(config, on_event=lambda name, facts: pipe.send(facts["address"])))


class Child:
    """A spawned process and our end of its pipe."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def receive(self) -> Any:
        if not self._pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"{self.process.name} said nothing for {START_TIMEOUT_S:g} s")
        return self._pipe.recv()


@contextlib.contextmanager
def running(child: Child) -> Iterator[Child]:
    try:
        yield child
    finally:
        child.process.terminate()
        child.process.join(10)
        child.process.kill()


class Link:
    """A router's end: counts frames that bring tokens. `ready` is set once a worker executes."""

    def __init__(self) -> None:
        self.frames = 0
        self.ready = asyncio.Event()
        self._changed = asyncio.Event()

    async def read(self, call: Any) -> None:
        async for frame in call:
            if frame.state.ready:
                self.ready.set()
            if frame.released:
                raise RuntimeError(f"a request was let go of: {frame.released[0]}")
            if frame.plain_tokens:
                self.frames += 1
                self._changed.set()

    async def until(self, frames: int) -> None:
        while self.frames < frames:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), STEP_TIMEOUT_S)


@contextlib.asynccontextmanager
async def linked(scheduler: str, submits: list[pb.Submit]) -> AsyncIterator[Link]:
    """A link that sends `submits` as soon as somebody can run them; cancelled at the end, which aborts them."""
    link = Link()

    async def outgoing() -> AsyncIterator[pb.RouterFrame]:
        yield pb.RouterFrame(hello=pb.LinkHello(protocol_version=PROTOCOL_VERSION, router="bench"))
        await link.ready.wait()
        yield pb.RouterFrame(submits=submits)
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(scheduler) as channel:
        call = rpc.SchedulingStub(channel).Link(outgoing())
        reader = asyncio.create_task(link.read(call))
        try:
            yield link
        finally:
            reader.cancel()
            call.cancel()
            await asyncio.gather(reader, return_exceptions=True)


def submit(key: int, max_tokens: int) -> pb.Submit:
    """Greedy, with a prompt that no other request shares."""
    prompt = (np.arange(PROMPT_TOKENS, dtype="<u4") * 31 + key * 977) % 100_000 + 10
    sampling = pb.RowSampling(temperature=0, top_p=1, repetition_penalty=1, seed=key)
    return pb.Submit(
        key=key, token_ids=prompt.tobytes(), sampling=sampling, n=1, max_tokens=max_tokens, logprobs=-1,
        prompt_logprobs=-1,
    )  # fmt: skip


class Window(msgspec.Struct):
    """A stretch of steps: when it was, and the CPU seconds that each process took meanwhile."""

    began_ns: int
    ended_ns: int
    scheduler_cpu_s: float
    worker_cpu_s: float
    others_cpu_share: float


async def observe(scheduler: str, pids: tuple[int, int], batch: int, num_steps: int, max_tokens: int) -> Window:
    """Lets the batch decode for so many steps once all its requests do."""
    async with linked(scheduler, [submit(key, max_tokens) for key in range(1, batch + 1)]) as link:
        await link.until(WARM_UP_STEPS)
        before, began_ns = [cpu_seconds(pid) for pid in pids], monotonic_ns()
        with OthersShare([psutil.Process().pid]) as others:  # and its children, the two among them
            await link.until(WARM_UP_STEPS + num_steps)
        spent = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
        return Window(began_ns, monotonic_ns(), *spent, others.share)


def measure(batch: int, num_steps: int) -> dict[str, Any]:
    """One batch, on processes of its own."""
    max_model_len = -(-(PROMPT_TOKENS + WARM_UP_STEPS + num_steps + 200) // 16) * 16
    max_tokens = max_model_len - PROMPT_TOKENS
    with running(Child(serve_scheduler, batch)) as scheduler:
        address = scheduler.receive()
        with running(Child(serve_worker, address, batch, max_model_len)) as worker:
            worker.receive()
            window = asyncio.run(observe(address, (scheduler.pid, worker.pid), batch, num_steps, max_tokens))
            worker.process.terminate()
            seen = json.loads(worker.receive())
    steps = [msgspec.convert(step, Step) for step in seen["steps"]]
    inside = [step for step in steps if window.began_ns <= step.started_ns <= window.ended_ns]
    return summarize(batch, window, inside, seen)


def summarize(batch: int, window: Window, steps: list[Step], seen: dict[str, Any]) -> dict[str, Any]:
    """The figures of goals.md, section D. `steps` are those within the window; all of them must decode the batch."""
    whole = [step for step in steps if step.decodes and step.rows == batch]
    if len(whole) < len(steps):
        raise RuntimeError(f"{len(steps) - len(whole)} of {len(steps)} steps were no decode steps of all {batch} rows")
    span_ns = steps[-1].done_ns - (steps[0].started_ns - steps[0].idle_ns)
    idle_ns = np.array([step.idle_ns for step in steps])
    ahead_ms = [(step.started_ns - step.begun_ns) / NS_PER_MS for step in steps]
    down = [size for rows, size in seen["down"] if rows == batch]
    up = [size for rows, size in seen["up"] if rows == batch]
    return {
        "steps": len(steps),
        "floor_ms": FLOORS_MS.get(batch),
        "idle_share": round(float(idle_ns.sum() / span_ns), 5),
        "steps_that_waited": int((idle_ns > 0).sum()),
        "worst_idle_ms": round(float(idle_ns.max()) / NS_PER_MS, 3),
        "begun_ahead_ms": {"median": round(statistics.median(ahead_ms), 3), "worst": round(min(ahead_ms), 3)},
        "bytes_down": {"mean": round(statistics.mean(down)), "most": max(down)},
        "bytes_up": {"mean": round(statistics.mean(up)), "most": max(up)},
        "scheduler_cpu_ms_per_step": round(window.scheduler_cpu_s * 1e3 / len(steps), 3),
        "worker_cpu_ms_per_step": round(window.worker_cpu_s * 1e3 / len(steps), 3),
        "others_cpu_share": round(window.others_cpu_share, 3),
    }


def repeat(batches: list[int], num_steps: int, repeats: int) -> dict[str, Any]:
    """By batch: every run, the batches in turn so that all see the same hours, and the medians of what is judged."""
    runs: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
    for _ in range(repeats):
        for batch in batches:
            runs[batch].append(measure(batch, num_steps))
    judged = ("idle_share", "scheduler_cpu_ms_per_step", "worker_cpu_ms_per_step", "others_cpu_share")
    return {
        str(batch): {"median": {name: statistics.median(run[name] for run in each) for name in judged}, "runs": each}
        for batch, each in runs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=sorted(FLOORS_MS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "host.json")
    options = parser.parse_args()
    figures = repeat(options.batches, options.steps, options.repeats)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": describe(), "batches": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
