"""Small steps with prompt tokens as CUDA graphs, beside the pure decode steps of graphs.py.

A chunk of a prompt beside decode rows is what a server computes most of the time, and a hit in the prefix cache leaves
a short chunk. Of up to some hundred tokens, the host takes longer to launch such a step kernel by kernel than the
device takes to compute it. So there is a graph for each number of tokens in `BUCKETS`; rows, tiles of prompts and rows
that decode are padded with the last row, which is nobody's, and tokens with ones that write nothing.
"""

import numpy as np
import structlog
import torch
from torch import Tensor

from kernels.ops.attention import mixed_tiles
from services.worker.execute.graphs import Capture, DecodeForward, Replay, SplitRoom
from services.worker.execute.inputs import Gathered, fed
from services.worker.execute.tables import DeviceTables
from services.worker.memory.copies import fill_from
from services.worker.models.decoder import MixedRows

log = structlog.get_logger("graphs")

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768)
"""Tokens of a step, one of which is padding."""
ALIGNED = 16
"""Numbers: so that each part of a buffer begins at a multiple of 16 bytes."""


def mixed_buckets(max_num_tokens: int) -> list[int]:
    """Those of `BUCKETS` that steps of up to `max_num_tokens` fill."""
    return [bucket for bucket in BUCKETS if bucket <= max_num_tokens]


class MixedGraphs:
    """Owns the buffers and the graphs. `logits` float32 [max_num_seqs, vocab_size] is where they write; the rest is as
    in graphs.Graphs. One thread at a time calls it."""

    def __init__(
        self,
        decoder: DecodeForward,
        pages: Tensor,
        last_tokens: Tensor,
        tables: DeviceTables,
        logits: Tensor,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
    ) -> None:
        self._decoder, self._pages, self._last_tokens, self._capture = decoder, pages, last_tokens, capture
        self._tables = tables
        self._logits, self._max_num_seqs = logits, max_num_seqs
        self._buckets = mixed_buckets(max_num_tokens)
        most = self._buckets[-1] if self._buckets else 0
        rows, device, groups = self._num_rows(most), pages.device, decoder.num_groups
        self._numbers = torch.zeros(2 + groups, most, dtype=torch.int64, device=device)
        self._logit_rows = torch.zeros(rows, dtype=torch.int64, device=device)
        sizes = (rows + 2, rows + 1, rows + 1, rows, 2 * self._num_tiles(most))
        self._parts = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)])
        self._rows = torch.zeros(int(self._parts[-1]), dtype=torch.int32, device=device)
        """query starts, contexts, the rows' slots, decode rows, tiles: one copy brings them all."""
        self._room = SplitRoom(decoder.spec, max_model_len)
        self._replays: dict[int, Replay] = {}

    @torch.inference_mode()
    def capture_all(self) -> None:
        """The largest first, so that the others find their memory there."""
        for bucket in reversed(self._buckets):
            empty, nothing = np.zeros(0, np.int64), np.zeros((self._numbers.shape[0], 0), np.int64)
            self._fill(bucket, nothing, np.zeros(1, np.int64), empty, empty, empty, [], empty)
            self._replays[bucket] = self._capture.capture(lambda bucket=bucket: self._compute(bucket))  # type: ignore[misc]
        log.info("graphs_captured", kind="mixed", buckets=len(self._buckets))

    def take(self, step: Gathered) -> Tensor | None:
        """float32 logits [n, vocab] of the step's `logit_rows`, good until the next step; None for one that no graph
        can hold, or that describes a prompt."""
        num_tokens, counts = step.numbers.shape[1], np.diff(step.starts)
        bucket = next((bucket for bucket in self._buckets if bucket > num_tokens), None)
        if bucket is None or bucket not in self._replays or step.prompt_rows or len(counts) > self._num_rows(bucket):
            return None
        decode_rows = np.flatnonzero(counts == 1)
        if not self._room.has_room(self._num_rows(bucket), step.contexts[decode_rows]):
            return None
        num_heads = self._decoder.spec.num_heads
        tiles = mixed_tiles(self._pages, counts.tolist(), step.contexts.tolist(), num_heads)
        if len(tiles) > self._num_tiles(bucket):
            return None
        self._fill(bucket, step.numbers, step.starts, step.contexts, step.rows, decode_rows, tiles, step.logit_rows)
        self._replays[bucket]()
        return self._logits[: len(step.logit_rows)]

    def _num_rows(self, bucket: int) -> int:
        """At most, beside the padding row; each has a token."""
        return min(bucket, self._max_num_seqs)

    def _num_tiles(self, bucket: int) -> int:
        """At most: a long prompt fills tiles, and a few short ones leave theirs half empty."""
        whole = mixed_tiles(self._pages, [bucket], [bucket], self._decoder.spec.num_heads)
        return max(bucket // 16, len(whole)) + 16

    def _fill(
        self,
        bucket: int,
        numbers: np.ndarray,
        starts: np.ndarray,
        contexts: np.ndarray,
        slots: np.ndarray,
        decode_rows: np.ndarray,
        tiles: list[tuple[int, int]],
        logit_rows: np.ndarray,
    ) -> None:
        """The buffers as the graph of `bucket` reads them, everything beyond the step being padding."""
        num_tokens, num_rows, padding_row = numbers.shape[1], len(contexts), self._num_rows(bucket)
        padded = np.zeros(self._numbers.shape, np.int64)
        padded[2:] = -1
        padded[:, :num_tokens] = numbers
        fill_from(self._numbers, padded)
        wanted = np.zeros(self._logit_rows.shape, np.int64)
        wanted[: len(logit_rows)] = logit_rows
        fill_from(self._logit_rows, wanted)
        rows = np.full(self._rows.shape, padding_row, np.int32)
        starts_at, contexts_at, slots_at, decodes_at, tiles_at, end = self._parts
        rows[starts_at:contexts_at] = num_tokens
        rows[starts_at : starts_at + len(starts)] = starts
        rows[contexts_at:decodes_at] = 0
        rows[contexts_at : contexts_at + num_rows] = contexts
        rows[slots_at : slots_at + num_rows] = slots
        rows[decodes_at : decodes_at + len(decode_rows)] = decode_rows
        rows[tiles_at + 1 : end : 2] = 0
        if tiles:
            rows[tiles_at : tiles_at + 2 * len(tiles)] = np.array(tiles, np.int32).reshape(-1)
        fill_from(self._rows, rows)

    def _compute(self, bucket: int) -> None:
        """The step as it is captured, on the beginning of each buffer."""
        rows = self._num_rows(bucket)
        numbers = self._numbers[:, :bucket]
        starts_at, contexts_at, slots_at, decodes_at, tiles_at, _ = self._parts.tolist()
        self._decoder.compute_mixed(
            MixedRows(
                token_ids=fed(numbers[0], self._last_tokens),
                positions=numbers[1],
                slots=numbers[2:],
                query_starts=self._rows[starts_at : starts_at + rows + 2],
                context_lens=self._rows[contexts_at : contexts_at + rows + 1],
                block_tables=self._tables.by_slot.index_select(1, self._rows[slots_at : slots_at + rows + 1]),
                tiles=self._rows[tiles_at : tiles_at + 2 * self._num_tiles(bucket)].view(-1, 2),
                decode_rows=self._rows[decodes_at : decodes_at + rows],
                logit_rows=self._logit_rows[:rows],
                max_splits=self._room.splits(rows),
            ),
            self._pages,
            self._logits[:rows],
        )
