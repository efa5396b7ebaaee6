"""A device that computes nothing and takes as long as an H200 must: the worker process of the host-path bench.

The runner does the host's real work for a step (slots, inputs, tokens back) and keeps a clock for the device, which
begins a step when the step before is done or when it was launched, whichever is later. The time between is idle.
"""

import asyncio
import json
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from services.worker import wire
from services.worker.execute.inputs import gather_decode, is_decode
from services.worker.execute.slots import Placed, Slots
from services.worker.host import Loaded, host
from services.worker.plan import NO_OUTPUT, ComputedStep, PendingStep, StepOutput, StepPlan
from services.worker.work import StepCosts
from shared.clock import NS_PER_MS, NS_PER_S, monotonic_ns
from shared.config import WorkerConfig
from shared.ids import new_instance_id

FLOORS_MS = {1: 3.52, 16: 3.99, 64: 5.49, 256: 12.85}
"""A decode step of Llama-3.1-8B in bfloat16 at a context of 1,024: the bytes that it must read at 4.3 TB/s."""
VOCAB = 128_256
BLOCK = 16
TOKEN_ID = 7
NO_COSTS = StepCosts(
    flops_per_token=0, flops_per_logits=0, flops_per_pair=0, layer_bytes=0, head_bytes=0, embedding_bytes_per_token=0,
    kv_bytes_per_position=0, windows={},
)  # fmt: skip


def floor_ns(num_rows: int) -> int:
    """Of a step of so many rows: what was computed for four batches, straight lines between."""
    batches = sorted(FLOORS_MS)
    return int(np.interp(num_rows, batches, [FLOORS_MS[batch] for batch in batches]) * NS_PER_MS)


class PretendPending:
    """A step that the device is done with at `done_ns`."""

    is_computed = False

    def __init__(self, placed: Placed, done_ns: int) -> None:
        self.placed, self.done_ns = placed, done_ns

    def wait(self) -> None:
        while (left_ns := self.done_ns - monotonic_ns()) > 0:
            time.sleep(left_ns / NS_PER_S)


class Step(msgspec.Struct, frozen=True):
    """What is known of one: nanoseconds of the monotonic clock, which processes of a machine share."""

    rows: int
    decodes: bool
    begun_ns: int
    """When the runner was asked to begin it."""
    started_ns: int
    done_ns: int
    idle_ns: int
    """That the device had nothing to do before it."""


class PretendGpu:
    """Implements StepRunner."""

    layers_done = 0
    num_late_compilations = 0

    def __init__(self, slots: Slots, step_ns: Callable[[int], int] = floor_ns) -> None:
        self.slots = slots
        slots.note_table_changes()
        self.steps: list[Step] = []
        self._step_ns = step_ns
        self._free_ns = 0

    def begin(self, plan: StepPlan) -> PendingStep:
        begun_ns = monotonic_ns()
        for admit in plan.admits:
            self.slots.admit(admit)
        self.slots.extend(plan)
        self.slots.take_table_changes()
        if len(plan.slots) == 0:
            return ComputedStep(NO_OUTPUT)
        decodes = is_decode(plan)
        if decodes:
            gather_decode(self.slots, plan)
        placed = self.slots.place(plan)
        launched_ns = monotonic_ns()
        started_ns = max(launched_ns, self._free_ns)
        idle_ns = started_ns - self._free_ns if self.steps else 0
        self._free_ns = started_ns + self._step_ns(len(plan.slots))
        self.steps.append(Step(len(plan.slots), decodes, begun_ns, started_ns, self._free_ns, idle_ns))
        return PretendPending(placed, self._free_ns)

    def finish(self, pending: PendingStep) -> StepOutput:
        if isinstance(pending, ComputedStep):
            return pending.output
        assert isinstance(pending, PretendPending)
        pending.wait()
        tokens = np.full(len(pending.placed.slots), TOKEN_ID, np.uint32)
        self.slots.fill(pending.placed, tokens)
        return StepOutput(tokens=tokens)

    def run(self, plan: StepPlan) -> StepOutput:
        return self.finish(self.begin(plan))

    def reset(self) -> None:
        self.slots.reset()


class CountedBytes:
    """Sizes of the messages between scheduler and worker, as they are on the wire before gRPC's frames."""

    def __init__(self) -> None:
        self.down: list[tuple[int, int]] = []
        """(rows of the plan, bytes)."""
        self.up: list[tuple[int, int]] = []
        self._parse, self._pack = wire.plan_from_message, wire.result_to_reply
        wire.plan_from_message, wire.result_to_reply = self._plan, self._result

    def _plan(self, message: Any, *prepared: Any) -> StepPlan:
        self.down.append((len(message.slots) // 2 if not message.admits else 0, message.ByteSize()))
        return self._parse(message, *prepared)

    def _result(self, result: Any) -> Any:
        reply = self._pack(result)
        self.up.append((len(result.output.tokens), reply.ByteSize()))
        return reply


def pretend_gpu(max_num_seqs: int, max_model_len: int, step_ns: Callable[[int], int] = floor_ns) -> PretendGpu:
    """With blocks enough for all slots' whole contexts."""
    num_blocks = max_num_seqs * -(-max_model_len // BLOCK)
    return PretendGpu(
        Slots(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=BLOCK,
            num_pool_blocks=num_blocks,
            vocab_size=VOCAB,
        ),
        step_ns,
    )


def loaded_with(runner: PretendGpu) -> Loaded:
    """The facts that such a worker registers with."""
    return Loaded(
        runner=runner,
        costs=NO_COSTS,
        model_fingerprint="pretend",
        dtype="bfloat16",
        device="pretend",
        block_size=BLOCK,
        num_blocks=runner.slots.num_pool_blocks,
        block_bytes=131_072 * BLOCK,
        max_num_seqs=runner.slots.max_num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=runner.slots.max_model_len,
        vocab_size=VOCAB,
    )


def serve_worker(pipe: Connection, scheduler: str, max_num_seqs: int, max_model_len: int) -> None:
    """A process: says when it is ready, serves until SIGTERM, then sends what it saw as JSON."""
    counted, runner = CountedBytes(), pretend_gpu(max_num_seqs, max_model_len)
    config = WorkerConfig(port=0, metrics_port=0, scheduler=scheduler, log_format="json")

    def on_event(name: str, facts: dict[str, Any]) -> None:
        if name == "ready":
            pipe.send("ready")

    run_loop(host(config, lambda progress: loaded_with(runner), instance=new_instance_id("worker"), on_event=on_event))
    pipe.send(json.dumps({"steps": msgspec.to_builtins(runner.steps), "down": counted.down, "up": counted.up}))


def run_loop(serving: Any) -> Any:
    """As `sluice` runs a service: on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serving)
    return uvloop.run(serving)
