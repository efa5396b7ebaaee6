"""The persistent rows of a worker: tokens, block tables and counts per slot. NumPy only, so that pretend devices share
it. Owned by the runner; changed on the device thread only.

Per slot: tokens [0, computed) have K and V in the pages, [computed, known) are still to be computed. A step that was
begun counts as computed, and its sampled token as known, before anybody has read it: `place` keeps its place and `fill`
writes it there once it is read. Such a token is the last known one, so a row that computes it computes nothing else.
"""

from dataclasses import dataclass

import numpy as np

from services.worker.plan import Admit, BlockTable, PlanError, StepPlan
from shared.cache_groups import Window, first_block

Array = np.ndarray

ALIGNED = 4
"""Columns of block tables, so that each row begins at a multiple of 16 bytes: kernels are compiled for that."""


@dataclass(slots=True, frozen=True)
class Placed:
    """Where the tokens of one step will stand: int64 [n], in row order. `admissions` tell whether a slot still belongs
    to the request that sampled."""

    slots: Array
    positions: Array
    admissions: Array


class Slots:
    """Arrays indexed by slot. `known` 0 means that nothing was admitted; the last `unread` of the known tokens have no
    id here yet. `admissions` counts the requests that a slot was given to.

    block_table     int32 [cache groups, slots, blocks of a sequence and up to 3 more]. Blocks before a group's window
                    may be other requests' by now, or were never this one's: what stands there is some block of the pool
    num_row_blocks  int64 [slots, cache groups]: where each table ends
    """

    __slots__ = (
        "_changes",
        "admissions",
        "block_size",
        "block_table",
        "computed",
        "known",
        "max_model_len",
        "max_num_seqs",
        "max_row_blocks",
        "num_pool_blocks",
        "num_row_blocks",
        "prompt_len",
        "tokens",
        "unread",
        "vocab_size",
        "windows",
    )

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_pool_blocks: int,
        vocab_size: int,
        windows: tuple[Window, ...] = (None,),
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.num_pool_blocks = num_pool_blocks
        self.vocab_size = vocab_size
        self.windows = windows
        # One column more than can be computed: the last position may still sample a token.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.max_row_blocks = -(-max_model_len // block_size)
        columns = -(-self.max_row_blocks // ALIGNED) * ALIGNED
        self.block_table = np.zeros((len(windows), max_num_seqs, columns), np.int32)
        self.num_row_blocks = np.zeros((max_num_seqs, len(windows)), np.int64)
        self.computed = np.zeros(max_num_seqs, np.int64)
        self.known = np.zeros(max_num_seqs, np.int64)
        self.prompt_len = np.zeros(max_num_seqs, np.int64)
        self.unread = np.zeros(max_num_seqs, np.int64)
        self.admissions = np.zeros(max_num_seqs, np.int64)
        self._changes: list[tuple[Array, Array]] | None = None

    def reset(self) -> None:
        if self._changes is not None:
            self._changes = []  # whoever has a slot next gets a table of its own
        self.known[:] = 0
        self.unread[:] = 0
        self.admissions += 1

    def admit(self, admit: Admit) -> None:
        """Takes a request up in its slot. Raises PlanError and changes nothing where it cannot be."""
        self._check_admit(admit)
        slot, known = admit.slot, len(admit.token_ids)
        self.tokens[slot, :known] = admit.token_ids
        self.num_row_blocks[slot] = 0
        for group, table in enumerate(admit.tables):
            end = table.first + len(table.blocks)
            self.block_table[group, slot, table.first : end] = table.blocks
            self._note(group, slot, np.arange(table.first, end), table.blocks)
            self.num_row_blocks[slot, group] = end
        self.computed[slot] = admit.computed
        self.known[slot] = known
        self.prompt_len[slot] = admit.prompt_len
        self.unread[slot] = 0
        self.admissions[slot] += 1

    def _check_admit(self, admit: Admit) -> None:
        known = len(admit.token_ids)
        if not 0 <= admit.slot < self.max_num_seqs:
            raise PlanError("slot_out_of_range", f"slot {admit.slot} of {self.max_num_seqs}")
        if not 1 <= known <= self.max_model_len:
            raise PlanError("tokens_out_of_range", f"slot {admit.slot}: {known} tokens, at most {self.max_model_len}")
        if not 1 <= admit.prompt_len <= known:
            raise PlanError("prompt_out_of_range", f"slot {admit.slot}: prompt of {admit.prompt_len} in {known} tokens")
        if not admit.computed < known:
            raise PlanError("computed_out_of_range", f"slot {admit.slot}: {admit.computed} computed of {known} known")
        if admit.token_ids.min() < 0 or admit.token_ids.max() >= self.vocab_size:
            raise PlanError("token_out_of_range", f"slot {admit.slot}: a token id beyond {self.vocab_size - 1}")
        if len(admit.tables) not in ((0, len(self.windows)) if admit.computed == 0 else (len(self.windows),)):
            raise PlanError(
                "tables_do_not_fit",
                f"slot {admit.slot}: {len(admit.tables)} block tables for {len(self.windows)} cache groups",
            )
        for window, table in zip(self.windows, admit.tables, strict=False):
            self._check_table(admit, window, table)

    def _check_table(self, admit: Admit, window: Window, table: BlockTable) -> None:
        end = table.first + len(table.blocks)
        too_late = table.first > first_block(window, admit.computed, self.block_size)
        if too_late or end * self.block_size < admit.computed or end > self.max_row_blocks:
            raise PlanError(
                "blocks_do_not_fit",
                f"slot {admit.slot}: blocks {table.first} to {end} for {admit.computed} computed tokens",
            )
        self._check_blocks(table.blocks)

    def _check_blocks(self, blocks: Array) -> None:
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= self.num_pool_blocks):
            raise PlanError("block_out_of_range", f"a block id beyond {self.num_pool_blocks - 1}")

    def extend(self, plan: StepPlan) -> None:
        """Checks the plan's rows and appends their further blocks. Raises PlanError and changes nothing where a row
        does not fit."""
        slots, counts = plan.slots, plan.counts
        if len(slots) == 0:
            return
        if slots.max() >= self.max_num_seqs or not self.known[slots].all():
            raise PlanError("unknown_slot", f"step {plan.step} names a slot that holds no request")
        if np.bincount(slots).max() > 1:
            raise PlanError("duplicate_slot", f"step {plan.step} names a slot twice")
        if len(plan.block_counts) != len(slots) * len(self.windows):
            raise PlanError(
                "block_counts_do_not_fit",
                f"step {plan.step}: {len(plan.block_counts)} for {len(slots)} rows of {len(self.windows)} cache groups",
            )
        ends = self.computed[slots] + counts
        self._check_counts(plan, ends)
        row_blocks = self.num_row_blocks[slots]
        after = row_blocks + plan.block_counts.reshape(row_blocks.shape)
        _check_rows(after.min(axis=1) * self.block_size < ends, plan, "blocks_missing", "beyond its blocks")
        _check_rows(after.max(axis=1) > self.max_row_blocks, plan, "too_many_blocks", "full table")
        if len(plan.blocks):
            self._check_blocks(plan.blocks)
            self._append_blocks(plan, row_blocks)
            self.num_row_blocks[slots] = after

    def _check_counts(self, plan: StepPlan, ends: Array) -> None:
        known = self.known[plan.slots]
        _check_rows(plan.counts < 1, plan, "empty_row", "no token to compute")
        _check_rows(ends > known, plan, "counts_beyond_known", "more tokens to compute than are known")
        _check_rows(plan.samples & (ends != known), plan, "sample_before_end", "samples before its last known token")

    def _append_blocks(self, plan: StepPlan, row_blocks: Array) -> None:
        """Writes the plan's blocks behind those that each slot has, all rows and groups at once."""
        added, num_groups = plan.block_counts, len(self.windows)
        first = np.repeat(row_blocks.reshape(-1) - (np.cumsum(added) - added), added)
        owners = np.repeat(np.arange(len(added)), added)
        places = first + np.arange(len(plan.blocks))
        groups, slots = owners % num_groups, plan.slots[owners // num_groups]
        self.block_table[groups, slots, places] = plan.blocks
        self._note(groups, slots, places, plan.blocks)

    def note_table_changes(self) -> None:
        """From here on what changes in the block tables is kept for `take_table_changes`."""
        self._changes = []

    def _note(self, groups: Array | int, slots: Array | int, places: Array, blocks: Array) -> None:
        if self._changes is not None:
            _, num_slots, columns = self.block_table.shape
            self._changes.append(((groups * num_slots + slots) * columns + places, blocks))

    def take_table_changes(self) -> tuple[Array, Array]:
        """Since the last time: places int64 [n] in the flat `block_table`, each at most once a step, and their blocks
        int32 [n]."""
        changes, self._changes = self._changes or (), []
        if not changes:
            return np.zeros(0, np.int64), np.zeros(0, np.int32)
        places, blocks = zip(*changes, strict=True)
        return np.concatenate(places), np.concatenate(blocks).astype(np.int32, copy=False)

    def kv_slots(self, rows: Array, positions: Array) -> Array:
        """int64 [cache groups, n], contiguous, block * block_size + offset: where K and V of `positions` [n] stand, in
        the slots `rows` [n]."""
        blocks = self.block_table[:, rows, positions // self.block_size].astype(np.int64)
        return np.ascontiguousarray(blocks * self.block_size + positions % self.block_size)

    def tables(self, rows: Array, longest: int) -> Array:
        """int32 [cache groups, rows, columns], contiguous: the block tables of the slots `rows` for contexts of up to
        `longest` tokens, and some more columns."""
        return np.ascontiguousarray(self.block_table[:, rows, : self.table_columns(longest)])

    def table_columns(self, longest: int) -> int:
        """Columns of block tables for contexts of up to `longest` tokens."""
        blocks = -(-longest // self.block_size)
        return -(-blocks // ALIGNED) * ALIGNED

    def place(self, plan: StepPlan) -> Placed:
        """Once the step is begun: what it computes, and a place for one further token of each sampling row."""
        self.computed[plan.slots] += plan.counts
        slots = plan.slots[plan.samples]
        placed = Placed(slots, self.known[slots], self.admissions[slots])
        self.known[slots] += 1
        self.unread[slots] += 1
        return placed

    def fill(self, placed: Placed, sampled: Array) -> None:
        """Writes a step's tokens, in row order, where they belong; not where another request has the slot by now."""
        slots, positions = placed.slots, placed.positions
        same = placed.admissions == self.admissions[slots]
        if not same.all():
            slots, positions, sampled = slots[same], positions[same], sampled[same]
        self.tokens[slots, positions] = sampled
        self.unread[slots] -= 1

    def advance(self, plan: StepPlan, sampled: Array) -> None:
        """Both at once, after a step whose tokens are at hand."""
        self.fill(self.place(plan), sampled)


def _check_rows(bad: Array, plan: StepPlan, name: str, what: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise PlanError(name, f"step {plan.step}, row {row}, slot {plan.slots[row]}: {what}")
