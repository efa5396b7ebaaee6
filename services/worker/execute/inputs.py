"""From slots and a plan to the decoder's one batch: gathered once per step, without a loop over rows or tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.worker.execute.slots import Slots
from services.worker.execute.tables import Tables
from services.worker.memory.copies import to_device
from services.worker.models.decoder import StepBatch
from services.worker.plan import StepPlan

Array = np.ndarray


@dataclass(slots=True, frozen=True)
class Inputs:
    """One step's batch, and where its logits belong.

    `sampled_at` int64: for each sampling row, in row order, its row among the logits. `prompt_rows`: (row of the plan,
    first and last + 1 row among the logits) for each row with prompt positions to describe. `feeds`: some token ids are
    -1 - slot, for the slot's last token, whose id is still on the device.
    """

    batch: StepBatch
    sampled_at: Array
    prompt_rows: tuple[tuple[int, int, int], ...]
    feeds: bool = False


@dataclass(slots=True, frozen=True)
class Gathered:
    """The same as arrays: `numbers` int64 [2 + groups, tokens], token ids, positions and slots of K and V in each cache
    group; `starts` int64 [rows + 1]; `rows`, the slots, and `contexts` int64 [rows]; `logit_rows` int64."""

    numbers: Array
    starts: Array
    rows: Array
    contexts: Array
    logit_rows: Array
    sampled_at: Array
    prompt_rows: tuple[tuple[int, int, int], ...]
    feeds: bool


def gather_arrays(slots: Slots, plan: StepPlan, describes_prompt: Array) -> Gathered:
    """Reads the rows of `plan`, which has at least one. `describes_prompt` bool [rows]."""
    counts, computed = plan.counts, slots.computed[plan.slots]
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    slot_of_token = np.repeat(plan.slots, counts)
    positions = np.repeat(computed - starts[:-1], counts) + np.arange(starts[-1])
    contexts = computed + counts
    logit_rows, sampled_at, prompt_rows = _choose_logits(slots, plan, starts, describes_prompt)
    token_ids = slots.tokens[slot_of_token, positions].astype(np.int64)
    unread = slots.unread[plan.slots] > 0
    feeds = bool(unread.any())
    if feeds:
        token_ids[starts[:-1][unread]] = -1 - plan.slots[unread]
    return Gathered(
        np.stack((token_ids, positions, *slots.kv_slots(slot_of_token, positions))),
        starts,
        plan.slots,
        contexts,
        logit_rows,
        sampled_at,
        prompt_rows,
        feeds,
    )


def inputs_of(gathered: Gathered, tables: Tables, *, exact: bool, device: torch.device) -> Inputs:
    """The batch lies on `device`."""
    numbers, num_tokens = gathered.numbers, gathered.numbers.shape[1]
    kv_slots = np.zeros(
        (len(numbers) - 2, num_tokens + num_tokens % 2), np.int64
    )  # lines begin at multiples of 16 bytes
    kv_slots[:, :num_tokens] = numbers[2:]
    batch = StepBatch(
        token_ids=to_device(numbers[0], device),
        positions=to_device(numbers[1], device),
        slots=to_device(kv_slots, device)[:, :num_tokens],
        query_starts=gathered.starts.tolist(),
        context_lens=gathered.contexts.tolist(),
        block_tables=tables.of(gathered.rows, int(gathered.contexts.max())),
        logit_rows=to_device(gathered.logit_rows, device),
        exact=exact,
    )
    return Inputs(batch, gathered.sampled_at, gathered.prompt_rows, gathered.feeds)


def fed(token_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """`token_ids` with the tokens that are still on the device: -1 - slot stands for a slot's last one."""
    last = last_tokens.index_select(0, (-1 - token_ids).clamp_min(0))
    return torch.where(token_ids < 0, last, token_ids)


def is_decode(plan: StepPlan) -> bool:
    """Every row computes its last known token, and samples."""
    return bool(plan.samples.all() and (plan.counts == 1).all())


def gather_decode(slots: Slots, plan: StepPlan) -> Array:
    """What a plan of n rows that `is_decode` takes from the slots: int64 [4 + groups, n], token ids (-1 - slot as in
    Inputs), positions, slots of K and V in each cache group, contexts, the rows' own slots."""
    rows = plan.slots
    positions = slots.computed[rows]
    token_ids = np.where(slots.unread[rows] > 0, -1 - rows, slots.tokens[rows, positions])
    return np.stack((token_ids, positions, *slots.kv_slots(rows, positions), positions + 1, rows))


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
