"""From slots and a plan to the decoder's one batch: gathered once per step, without a loop over rows or tokens."""

from dataclasses import dataclass

import numpy as np
import torch

from services.worker.execute.slots import Slots
from services.worker.models.decoder import StepBatch
from services.worker.plan import StepPlan

Array = np.ndarray


@dataclass(slots=True, frozen=True)
class Inputs:
    """One step's batch, and where its logits belong.

    `sampled_at` int64: for each sampling row, in row order, its row among the logits. `prompt_rows`: (row of the plan,
    first and last + 1 row among the logits) for each row with prompt positions to describe.
    """

    batch: StepBatch
    sampled_at: Array
    prompt_rows: tuple[tuple[int, int, int], ...]


def gather(slots: Slots, plan: StepPlan, describes_prompt: Array, *, exact: bool) -> Inputs:
    """Reads the rows of `plan`, which has at least one. `describes_prompt` bool [rows]."""
    counts, computed = plan.counts, slots.computed[plan.slots]
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    slot_of_token = np.repeat(plan.slots, counts)
    positions = np.repeat(computed - starts[:-1], counts) + np.arange(starts[-1])
    blocks = slots.block_table[slot_of_token, positions // slots.block_size].astype(np.int64)
    contexts = computed + counts
    num_columns = -(-int(contexts.max()) // slots.block_size)
    logit_rows, sampled_at, prompt_rows = _choose_logits(slots, plan, starts, describes_prompt)
    batch = StepBatch(
        token_ids=torch.from_numpy(slots.tokens[slot_of_token, positions].astype(np.int64)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(blocks * slots.block_size + positions % slots.block_size),
        query_starts=starts.tolist(),
        context_lens=contexts.tolist(),
        block_tables=torch.from_numpy(slots.block_table[plan.slots, :num_columns]),
        logit_rows=torch.from_numpy(logit_rows),
        exact=exact,
    )
    return Inputs(batch, sampled_at, prompt_rows)


def _choose_logits(
    slots: Slots, plan: StepPlan, starts: Array, describes_prompt: Array
) -> tuple[Array, Array, tuple[tuple[int, int, int], ...]]:
    last_tokens = starts[1:][plan.samples] - 1
    if not describes_prompt.any():
        return last_tokens, np.arange(len(last_tokens)), ()
    # The logits of position p describe the token at p + 1, which must belong to the prompt.
    computed = slots.computed[plan.slots]
    described = np.minimum(plan.counts, slots.prompt_len[plan.slots] - 1 - computed)
    described = np.where(describes_prompt, np.maximum(described, 0), 0)
    wanted = np.zeros(starts[-1], np.bool_)
    wanted[last_tokens] = True
    offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], plan.counts)
    wanted |= offsets < np.repeat(described, plan.counts)
    logit_rows = np.flatnonzero(wanted)
    firsts = np.searchsorted(logit_rows, starts[:-1])
    rows = np.flatnonzero(described)
    prompt_rows = zip(rows.tolist(), firsts[rows].tolist(), (firsts + described)[rows].tolist(), strict=True)
    return logit_rows, np.searchsorted(logit_rows, last_tokens), tuple(prompt_rows)
