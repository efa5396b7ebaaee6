"""The worst step that a worker may be given, run once before the KV pool is made, to see what memory it takes.

It runs on a pool of one block, which all rows share: what they read there is no matter, only how much is held at once.
"""

from collections.abc import Callable

import msgspec
import numpy as np

from services.worker.execute.graphs import Replay, buckets_upto, exact_buckets_upto
from services.worker.execute.mixed_graphs import mixed_buckets
from services.worker.execute.runner import Runner
from services.worker.memory.budget import GRAPH_BYTES, Gauge
from services.worker.models.decoder import Decoder
from services.worker.plan import Admit, StepPlan
from shared.config import WorkerConfig
from shared.sampling import Sampling

LOGPROBS = 20
"""Alternatives that every row asks for, of prompt and answer: the raw logits are then kept beside the changed ones."""
WORST_SAMPLING = Sampling(seed=1, temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, logit_bias=((0, 1.0),))


class Called:
    """Instead of a graph: every one is called once, for a step of prompts may take more than one of more rows that
    decode; a step then calls the largest again."""

    def capture(self, function: Callable[[], None]) -> Replay:
        function()
        return function


class StepMemory(msgspec.Struct, frozen=True):
    """Bytes at the most: of a step that is launched kernel by kernel, and of the graphs with their buffers (which keep
    theirs)."""

    eager: int
    graphs: int

    @property
    def total(self) -> int:
        return self.eager + self.graphs


def measure_steps(
    config: WorkerConfig, decoder: Decoder, runner: Runner, gauge: Gauge, *, max_model_len: int, with_graphs: bool
) -> StepMemory:
    """`runner` lies on a pool of one block, has slots for contexts of `max_model_len`, and is good for nothing more."""
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    lengths = _spread(config.max_num_batched_tokens, rows, max_model_len - 1)
    block_size = config.block_size
    prompts = _prompts(lengths, block_size, decoder.num_groups)
    eager = gauge.peak_of(lambda: _run(runner, prompts))
    if not with_graphs:
        return StepMemory(eager=eager, graphs=0)
    decode = _decode(lengths, block_size, decoder.num_groups)

    def replay() -> None:
        runner.capture_graphs(decoder, Called(), max_num_tokens=config.max_num_batched_tokens)
        runner.run(decode)

    num_graphs = len(exact_buckets_upto(config.max_num_seqs))
    if not runner.is_exact:
        num_graphs += len(buckets_upto(config.max_num_seqs)) + len(mixed_buckets(config.max_num_batched_tokens))
    return StepMemory(eager=eager, graphs=gauge.peak_of(replay) + GRAPH_BYTES * num_graphs)


def _run(runner: Runner, plan: StepPlan) -> None:
    runner.run(plan)


def _spread(num_tokens: int, rows: int, longest: int) -> list[int]:
    """As even as whole numbers are, none above `longest`, none below 1."""
    lengths = [num_tokens // rows + (row < num_tokens % rows) for row in range(rows)]
    return [max(1, min(length, longest)) for length in lengths]


def _prompts(lengths: list[int], block_size: int, num_groups: int) -> StepPlan:
    """Whole prompts, every block of which is block 0."""
    admits = tuple(
        Admit(
            slot=slot,
            token_ids=np.zeros(length, np.int32),
            prompt_len=length,
            sampling=WORST_SAMPLING,
            logprobs=LOGPROBS,
            prompt_logprobs=LOGPROBS,
        )
        for slot, length in enumerate(lengths)
    )
    block_counts = np.array([-(-length // block_size) for length in lengths])
    return _plan(lengths, np.repeat(block_counts, num_groups), admits)


def _decode(lengths: list[int], block_size: int, num_groups: int) -> StepPlan:
    """One further token of each."""
    block_counts = np.array([int(length % block_size == 0) for length in lengths])
    return _plan([1] * len(lengths), np.repeat(block_counts, num_groups), ())


def _plan(counts: list[int], block_counts: np.ndarray, admits: tuple[Admit, ...]) -> StepPlan:
    return StepPlan(
        step=0,
        slots=np.arange(len(counts)),
        counts=np.array(counts),
        block_counts=block_counts,
        samples=np.ones(len(counts), np.bool_),
        blocks=np.zeros(int(block_counts.sum()), np.int32),
        admits=admits,
    )
