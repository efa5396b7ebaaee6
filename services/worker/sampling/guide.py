"""Where one answer stands in its grammar, and which tokens may come next.

The mask of a row's next token is computed on a thread as soon as the token before it is read, beside whatever the
device does: the sampler waits for it only where it comes to that row before.
"""

from concurrent.futures import Executor, Future

import numpy as np
from llguidance import LLMatcher

from services.worker.plan import Array
from shared.text.grammar import UNSATISFIABLE, fault_of

MAX_ERROR_CHARS = 300


class Guide:
    """One row's. Used on the device thread, whose calls alternate: `allowed`, then `accept`."""

    def __init__(self, grammar: LLMatcher, generated: Array, vocab_size: int, executor: Executor) -> None:
        """`grammar` is copied; `generated` are the tokens of the answer that are known."""
        self.error = ""
        """Why the row cannot go on, once its mask was waited for."""
        self._num_words = -(-vocab_size // 32)
        self._executor = executor
        self._matcher: LLMatcher | None = None
        self._next: Future[Array] = executor.submit(self._begin, grammar, generated.tolist())

    def allowed(self) -> Array:
        """int32 [ceil(vocab / 32)], bit t % 32 of word t // 32 set where token t may come next."""
        return self._next.result()

    def accept(self, token_id: int) -> None:
        """The token that was sampled."""
        self._next = self._executor.submit(self._advance, token_id)

    def _begin(self, grammar: LLMatcher, generated: list[int]) -> Array:
        self._matcher = grammar.deep_copy()
        self._matcher.consume_tokens(generated)
        return self._mask()

    def _advance(self, token_id: int) -> Array:
        assert self._matcher is not None
        self._matcher.consume_token(token_id)
        return self._mask()

    def _mask(self) -> Array:
        assert self._matcher is not None
        mask = np.frombuffer(self._matcher.compute_bitmask(), "<i4", self._num_words).astype(np.int32)
        if self._matcher.is_error():
            self.error = self.error or fault_of(self._matcher)[:MAX_ERROR_CHARS]
        elif not mask.any():
            self.error = UNSATISFIABLE
        return np.full_like(mask, -1) if self.error else mask
