"""Where answers stand in their grammars, and which tokens may come next.

Masks are computed where they are needed, on the device thread: on a GPU while the device computes what they mask. A
thread beside it saves little and costs more: a row takes some 30 µs of a bundled model's step of 5 ms, which is what it
takes to wake a thread, and where all cores have work the step then waits for that thread to get one.
"""

from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from services.worker.plan import Array
from shared.text.grammar import UNSATISFIABLE, fault_of

MAX_ERROR_CHARS = 300


class Guide:
    """One row's."""

    __slots__ = ("_grammar", "_known", "_matcher", "error")

    def __init__(self, grammar: LLMatcher, generated: Array) -> None:
        """`grammar` is copied; `generated` are the tokens of the answer that are known."""
        self.error = ""
        """Why the row cannot go on, once its mask was asked for."""
        self._grammar = grammar
        self._known: list[int] = generated.tolist()
        self._matcher: LLMatcher | None = None

    def accept(self, token_id: int) -> None:
        """The token that was sampled."""
        self._known.append(token_id)

    def matcher(self) -> LLMatcher:
        """Behind all tokens that are known."""
        if self._matcher is None:
            self._matcher = self._grammar.deep_copy()
        self._matcher.consume_tokens(self._known)
        self._known.clear()
        return self._matcher

    def check(self, *, any_left: bool) -> None:
        """Notes what went wrong with a mask, which leaves some token or none."""
        assert self._matcher is not None
        if self._matcher.is_error():
            self.error = self.error or fault_of(self._matcher)[:MAX_ERROR_CHARS]
        elif not any_left:
            self.error = UNSATISFIABLE


class Masks:
    """Computes those of a step's rows, on several threads where there are many rows."""

    def __init__(self, vocab_size: int, num_threads: int = 1) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None

    def allowed(self, guides: Sequence[Guide]) -> Array:
        """int32 [guides, ceil(vocab / 32)], bit t % 32 of word t // 32 set where token t may come next. All are where
        the guide has an error."""
        masks = np.empty((len(guides), self._num_words), np.int32)
        self._compute([guide.matcher() for guide in guides], masks)
        for guide, mask, any_left in zip(guides, masks, masks.any(axis=1).tolist(), strict=True):
            guide.check(any_left=any_left)
            if guide.error:
                mask.fill(-1)
        return masks

    def _compute(self, matchers: Sequence[LLMatcher], masks: Array) -> None:
        address, size = masks.ctypes.data, masks.strides[0]
        if self._executor is not None and len(matchers) > 1:
            numbered = [(matcher, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(numbered, address, size, len(matchers))
            return
        for row, matcher in enumerate(matchers):
            matcher.unsafe_compute_mask_ptr(address + row * size, size)
