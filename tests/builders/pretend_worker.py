"""A worker without a model: the real servicer, registration and device thread around a runner that hashes.

It 'samples' a function of the row's whole history (`pretend_token`), so any mix of batches, chunks, preemptions and
workers must give the same tokens. It also keeps a pretend KV pool: a page remembers, per position, the hash of the
history that wrote it, and a step that reads a page written for another history fails. So a wrong block table, a block
reused too early or a false prefix hit is an error and not a wrong answer.

`python -m tests.builders.pretend_worker --scheduler 127.0.0.1:50052 --port 0 --step-ms 1 --num-blocks 256`
"""

import argparse
import asyncio
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from services.worker.execute.slots import Slots
from services.worker.host import Loaded, host
from services.worker.plan import (
    Admit,
    RowLogprobs,
    RowPromptLogprobs,
    StepError,
    StepOutput,
    StepPlan,
    WholeStepRunner,
)
from services.worker.work import StepCosts
from shared.config import WorkerConfig
from shared.ids import new_instance_id
from shared.net.server import BindError
from shared.sampling import NO_LOGPROBS, Sampling
from shared.telemetry.logs import configure_logs

GOLDEN = 0x9E3779B1
FIRST_TOKEN_ID = 16
"""Lower ids are never 'sampled', so that a test may declare them stop tokens."""


def pretend_token(token_ids: Sequence[int], sampling: Sampling, *, sample_index: int = 0, vocab_size: int = 512) -> int:
    """What the pretend worker samples next: for greedy rows by history alone, for others by seed and sample too."""
    return _token(history_hash(token_ids), sampling, sample_index, vocab_size)


def history_hash(token_ids: Sequence[int], parent: int = 0) -> int:
    """CRC-32 of the ids as uint32, continued from `parent`."""
    return zlib.crc32(np.asarray(token_ids, "<u4").tobytes(), parent)


def _token(history: int, sampling: Sampling, sample_index: int, vocab_size: int) -> int:
    mixed = history
    if sampling.temperature > 0:
        mixed = zlib.crc32(sampling.seed.to_bytes(8, "little") + sample_index.to_bytes(4, "little"), history)
    return FIRST_TOKEN_ID + (mixed * GOLDEN >> 7) % (vocab_size - FIRST_TOKEN_ID)


class PretendRunner(WholeStepRunner):
    """Runs plans by hashing. `fail_step` is asked before each step: True makes it fail."""

    def __init__(
        self,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_model_len: int = 1024,
        vocab_size: int = 512,
        step_ms: float = 0.0,
        fail_step: Callable[[StepPlan], bool] = lambda plan: False,
    ) -> None:
        self.slots = Slots(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            num_pool_blocks=num_blocks,
            vocab_size=vocab_size,
        )
        self.steps = 0
        self.layers_done = 0
        self._step_ms = step_ms
        self._fail_step = fail_step
        self._pages = np.zeros((num_blocks, block_size), np.uint32)
        self._history = np.zeros((max_num_seqs, max_model_len + 1), np.uint32)
        self._admits: dict[int, Admit] = {}

    def reset(self) -> None:
        self.slots.reset()
        self._admits.clear()

    def run(self, plan: StepPlan) -> StepOutput:
        if self._step_ms:
            time.sleep(self._step_ms / 1000)
        if self._fail_step(plan):
            raise StepError("pretend failure")
        for admit in plan.admits:
            self.slots.admit(admit)
            self._admits[admit.slot] = admit
            self._hash_history(admit.slot, 0)
        self.slots.extend(plan)
        self._write_pages(plan)
        self._read_pages(plan)
        output = self._sample(plan)
        self.steps += 1
        return output

    def _hash_history(self, slot: int, start: int) -> None:
        """History of the known tokens from `start`: entry p covers tokens [0, p]."""
        history = int(self._history[slot, start - 1]) if start else 0
        for position in range(start, int(self.slots.known[slot])):
            history = history_hash(self.slots.tokens[slot, position : position + 1], history)
            self._history[slot, position] = history

    def _pages_of(self, slot: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, end)
        return self.slots.block_table[0, slot, positions // self.slots.block_size], positions % self.slots.block_size

    def _write_pages(self, plan: StepPlan) -> None:
        for slot, count in zip(plan.slots.tolist(), plan.counts.tolist(), strict=True):
            start = int(self.slots.computed[slot])
            self._pages[self._pages_of(slot, start, start + count)] = self._history[slot, start : start + count]

    def _read_pages(self, plan: StepPlan) -> None:
        for slot, count in zip(plan.slots.tolist(), plan.counts.tolist(), strict=True):
            end = int(self.slots.computed[slot]) + count
            wrong = self._pages[self._pages_of(slot, 0, end)] != self._history[slot, :end]
            if wrong.any():
                position = int(np.argmax(wrong))
                block = int(self.slots.block_table[0, slot, position // self.slots.block_size])
                raise StepError(f"corrupt KV: slot {slot} reads position {position} in block {block}, another's")

    def _sample(self, plan: StepPlan) -> StepOutput:
        tokens, logprobs, prompt_logprobs = [], [], []
        for row, slot in enumerate(plan.slots.tolist()):
            admit = self._admits[slot]
            if admit.prompt_logprobs != NO_LOGPROBS:
                prompt_logprobs += self._prompt_logprobs(row, slot, int(plan.counts[row]), admit)
            if not plan.samples[row]:
                continue
            last = int(self.slots.known[slot]) - 1
            history = int(self._history[slot, last])
            tokens.append(_token(history, admit.sampling, admit.sample_index, self.slots.vocab_size))
            if admit.logprobs != NO_LOGPROBS:
                logprobs.append(RowLogprobs(row, -1.0, 1, *_top(tokens[-1:], admit.logprobs)))
        sampled = np.asarray(tokens, np.uint32)
        self.slots.advance(plan, sampled)
        for slot in plan.slots[plan.samples].tolist():
            self._hash_history(slot, int(self.slots.known[slot]) - 1)
        return StepOutput(sampled, tuple(logprobs), tuple(prompt_logprobs))

    def _prompt_logprobs(self, row: int, slot: int, count: int, admit: Admit) -> list[RowPromptLogprobs]:
        """Logprob -1 and rank 1 for every prompt position that this chunk predicts."""
        start = int(self.slots.computed[slot]) + 1
        end = min(start + count, admit.prompt_len)
        if start >= end:
            return []
        ids, logprobs = _top(self.slots.tokens[slot, start:end], admit.prompt_logprobs)
        count = end - start
        shape = (count, admit.prompt_logprobs)
        ranks = np.ones(count, np.uint32)
        return [
            RowPromptLogprobs(
                row, start, np.full(count, -1, np.float32), ranks, ids.reshape(shape), logprobs.reshape(shape)
            )
        ]


def _top(tokens: Sequence[int] | np.ndarray, num_top: int) -> tuple[np.ndarray, np.ndarray]:
    """Pretend alternatives: the token and the ids above it, logprobs -1, -2, …; flat, `num_top` per token."""
    ids = np.asarray(tokens, np.uint32)[:, None] + np.arange(num_top, dtype=np.uint32)
    logprobs = np.broadcast_to(-1.0 - np.arange(num_top, dtype=np.float32), ids.shape)
    return ids.reshape(-1), logprobs.reshape(-1)


COSTS = StepCosts(
    flops_per_token=1000,
    flops_per_logits=100,
    flops_per_pair=1,
    layer_bytes=4000,
    head_bytes=400,
    embedding_bytes_per_token=40,
    kv_bytes_per_position=4,
    windows={None: 1},
)
"""Round numbers, so that a test can tell what was counted."""


def pretend_loaded(runner: PretendRunner, *, max_num_batched_tokens: int = 2048) -> Loaded:
    """The facts that a pretend worker registers with."""
    slots = runner.slots
    return Loaded(
        runner=runner,
        costs=COSTS,
        model_fingerprint="pretend",
        dtype="float32",
        device="pretend",
        block_size=slots.block_size,
        num_blocks=slots.num_pool_blocks,
        block_bytes=4 * slots.block_size,
        max_num_seqs=slots.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=slots.max_model_len,
        vocab_size=slots.vocab_size,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM. Prints `ready ADDRESS` once the scheduler knows it."""
    options = _options(arguments)
    instance = new_instance_id("worker")
    configure_logs("sluice-worker", instance)
    runner = PretendRunner(
        num_blocks=options.num_blocks,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        vocab_size=options.vocab_size,
        step_ms=options.step_ms,
        fail_step=lambda plan: bool(options.fail_file) and _take(Path(options.fail_file)),
    )
    loaded = pretend_loaded(runner, max_num_batched_tokens=options.max_num_batched_tokens)
    config = WorkerConfig(host=options.host, port=options.port, metrics_port=0, scheduler=options.scheduler)

    def on_event(name: str, facts: dict[str, object]) -> None:
        if name == "ready":
            print(f"ready {facts['address']}", flush=True)

    try:
        return asyncio.run(host(config, lambda progress: loaded, instance=instance, on_event=on_event))
    except BindError as error:
        print(error, file=sys.stderr)
        return 1


def _take(path: Path) -> bool:
    """True once per file: a test creates it to make the next step fail."""
    if not path.exists():
        return False
    path.unlink()
    return True


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a worker that hashes instead of computing")
    parser.add_argument("--scheduler", default="127.0.0.1:50052")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--num-blocks", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--fail-file", default="", help="the step that finds this file removes it and fails")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
