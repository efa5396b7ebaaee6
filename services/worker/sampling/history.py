"""Which tokens a row has seen, for the penalties. Kept only for the slots that ask."""

import numpy as np

Array = np.ndarray

ABSENT = -1


class TokenCounts:
    """The distinct tokens of one row's history: `token_ids` int64 and how often each was generated (float32, 0 for
    those of the prompt alone). With `with_prompt` false the prompt is left out: only repetition looks at it."""

    __slots__ = ("_counts", "_ids", "_index_of", "_size")

    def __init__(self, prompt: Array, output: Array, vocab_size: int, *, with_prompt: bool) -> None:
        seen, generated = np.unique(output, return_counts=True)
        ids = np.union1d(prompt, seen) if with_prompt else seen
        self._size = len(ids)
        self._ids = np.empty(len(ids) + 64, np.int64)
        self._counts = np.zeros(len(ids) + 64, np.float32)
        self._ids[: self._size] = ids
        self._index_of = np.full(vocab_size, ABSENT, np.int32)
        self._index_of[ids] = np.arange(len(ids))
        self._counts[self._index_of[seen]] = generated

    @property
    def token_ids(self) -> Array:
        return self._ids[: self._size]

    @property
    def output_counts(self) -> Array:
        return self._counts[: self._size]

    def add(self, token_id: int) -> None:
        """Counts one generated token."""
        index = int(self._index_of[token_id])
        if index == ABSENT:
            index = self._append(token_id)
        self._counts[index] += 1

    def _append(self, token_id: int) -> int:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[self._size] = token_id
        self._index_of[token_id] = self._size
        self._size += 1
        return self._size - 1
