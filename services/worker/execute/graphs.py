"""Pure decode steps as CUDA graphs: one launch from the host instead of some nine a layer.

A graph is a fixed list of launches on fixed addresses. So there is one for each number of rows in `buckets_upto`, all
on the same buffers, captured before the worker takes plans; a step fills the buffers, pads its rows to the next bucket
and replays. Exact steps have graphs of their own, fewer ones. What a graph cannot hold (contexts that need more room
for attention's work than the buffers have) runs eagerly: `take` says no. Steps with prompt tokens are the business of
mixed_graphs.py.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from kernels.ops.attention import decode_splits, most_decode_splits
from services.worker.execute.inputs import fed
from services.worker.execute.tables import DeviceTables
from services.worker.memory.copies import fill_from
from services.worker.models.decoder import DecodeRows, MixedRows
from services.worker.models.spec import ModelSpec

log = structlog.get_logger("graphs")

FINE_STEP, FINE_ROWS, COARSE_STEP = 8, 256, 64
FEWEST_EXACT_ROWS, EXACT_STEP = 16, 64
"""Exact products are made in tiles of 64 rows and more, so finer buckets would save little."""
MAX_PARTIAL_BYTES = 256 * 2**20
"""Of attention's unfinished sums, float32, per cache group: at 32 heads of 128 room for 16,000 splits."""
WARM_UP_CALLS = 2
"""Before a capture: the first compiles kernels and makes handles, which no capture may do."""

Replay = Callable[[], None]


class Capture(Protocol):
    """How a function that only launches becomes one that launches the same again."""

    def capture(self, function: Callable[[], None]) -> Replay: ...


class CudaCapture:
    """CUDA graphs that share their memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, function: Callable[[], None]) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_CALLS):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class DecodeForward(Protocol):
    """The part of a decoder that graphs need."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def num_groups(self) -> int: ...

    def reserve(self, max_model_len: int) -> None: ...

    def decode(self, rows: DecodeRows, pool: Tensor, out: Tensor) -> None: ...

    def compute_mixed(self, rows: MixedRows, pool: Tensor, out: Tensor) -> None: ...


class SplitRoom:
    """How many splits of contexts a graph sets memory aside for."""

    def __init__(self, spec: ModelSpec, max_model_len: int) -> None:
        self._max_model_len, self._num_kv_heads = max_model_len, spec.num_kv_heads
        self._affordable = MAX_PARTIAL_BYTES // (4 * spec.num_heads * (spec.head_dim + 2))
        self._windows = tuple(dict.fromkeys(spec.windows))

    def splits(self, rows: int) -> dict[int | None, int]:
        """By window: for the longest contexts in all rows, or as many as is affordable; at least one row's, and one for
        each."""
        return {window: self._splits(rows, window) for window in self._windows}

    def _splits(self, rows: int, window: int | None) -> int:
        return min(self._most(rows, window), max(self._most(1, window) + rows - 1, self._affordable))

    def _most(self, rows: int, window: int | None) -> int:
        return most_decode_splits(rows, self._max_model_len, window, self._num_kv_heads)

    def has_room(self, rows: int, contexts: np.ndarray) -> bool:
        """Whether decode rows of such contexts fit into a graph of `rows`, the others of which are padding."""
        padded = [*contexts.tolist(), *[0] * (rows - len(contexts))]
        for window in self._windows:
            room = self._splits(rows, window)
            if room < self._most(rows, window) and decode_splits(padded, window, self._num_kv_heads) > room:
                return False
        return True


def buckets_upto(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, …, and `max_num_seqs` itself; wider apart beyond 256 rows."""
    fine = range(FINE_STEP, FINE_ROWS + 1, FINE_STEP)
    coarse = range(FINE_ROWS + COARSE_STEP, max_num_seqs, COARSE_STEP)
    return [rows for rows in (1, 2, 4, *fine, *coarse) if rows < max_num_seqs] + [max_num_seqs]


def exact_buckets_upto(max_num_seqs: int) -> list[int]:
    """The same for exact steps: 16, 64, 128, 192, …, and `max_num_seqs` itself."""
    steps = range(EXACT_STEP, max_num_seqs, EXACT_STEP)
    return [rows for rows in (FEWEST_EXACT_ROWS, *steps) if rows < max_num_seqs] + [max_num_seqs]


class Graphs:
    """Owns the buffers and the graphs. `last_tokens` int64 by slot, where token ids below 0 are looked up; `tables` the
    block tables; `pages` is the pool; `exact_only` leaves out those of steps that are not. One thread at a time calls
    it."""

    def __init__(
        self,
        decoder: DecodeForward,
        pages: Tensor,
        last_tokens: Tensor,
        tables: DeviceTables,
        capture: Capture,
        *,
        max_num_seqs: int,
        max_model_len: int,
        exact_only: bool = False,
    ) -> None:
        self._decoder, self._pages, self._last_tokens, self._capture = decoder, pages, last_tokens, capture
        self._tables = tables
        self._buckets = {True: exact_buckets_upto(max_num_seqs)}
        if not exact_only:
            self._buckets = {False: buckets_upto(max_num_seqs), **self._buckets}
        self._max_model_len = max_model_len
        device, room = pages.device, -(-max_num_seqs // 16) * 16  # so that each line begins at a multiple of 16 bytes
        self._numbers = torch.zeros(4 + decoder.num_groups, room, dtype=torch.int64, device=device)
        self._logits = torch.zeros(max_num_seqs, decoder.spec.vocab_size, dtype=torch.float32, device=device)
        self._room = SplitRoom(decoder.spec, max_model_len)
        self._replays: dict[tuple[int, bool], Replay] = {}

    @property
    def logits(self) -> Tensor:
        """Where they go, float32 [max_num_seqs, vocab_size]: good for whatever does not run at the same time."""
        return self._logits

    @torch.inference_mode()
    def capture_all(self) -> None:
        """The largest first, so that the others find their memory there."""
        self._decoder.reserve(self._max_model_len)
        fill_from(self._numbers, self._padded(np.empty((self._numbers.shape[0], 0), np.int64)))
        for exact, buckets in self._buckets.items():
            for rows in reversed(buckets):
                replay = self._capture.capture(lambda rows=rows, exact=exact: self._decode(rows, exact))  # type: ignore[misc]
                self._replays[rows, exact] = replay
            log.info("graphs_captured", exact=exact, buckets=len(buckets), max_rows=buckets[-1])

    def _decode(self, rows: int, exact: bool) -> None:
        """The step as it is captured, on the first `rows` rows of the buffers."""
        numbers = self._numbers[:, :rows]
        self._decoder.decode(
            DecodeRows(
                token_ids=fed(numbers[0], self._last_tokens),
                positions=numbers[1],
                slots=numbers[2:-2],
                context_lens=numbers[-2].to(torch.int32),
                block_tables=self._tables.by_slot.index_select(1, numbers[-1]),
                max_splits=self._room.splits(rows),
                exact=exact,
            ),
            self._pages,
            self._logits[:rows],
        )

    def take(self, numbers: np.ndarray, exact: bool) -> Tensor | None:
        """float32 logits [n, vocab] of the step of `inputs.gather_decode`, good until the next one; None for a step
        that no graph can hold."""
        num_rows = numbers.shape[1]
        rows = next((bucket for bucket in self._buckets.get(exact, ()) if bucket >= num_rows), None)
        if rows is None or (rows, exact) not in self._replays:
            return None
        if not (exact or self._room.has_room(rows, numbers[-2])):
            return None
        fill_from(self._numbers, self._padded(numbers))
        self._replays[rows, exact]()
        return self._logits[:num_rows]

    def _padded(self, numbers: np.ndarray) -> np.ndarray:
        """Whole buffers' worth: behind the rows token and position 0, slots below 0, a context of 0 and any table."""
        padded = np.zeros(self._numbers.shape, np.int64)
        padded[2:-2] = -1
        padded[:, : numbers.shape[1]] = numbers
        return padded
