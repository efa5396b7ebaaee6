"""Grammars compiled beside the steps, on a thread of their own; each is kept for those who ask for it again.
Torch-free."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog
from llguidance import LLMatcher, LLTokenizer

from shared.structured import Structured
from shared.text.grammar import GrammarError, compile_grammar

log = structlog.get_logger("grammars")

MAX_KEPT = 64
MAX_KEPT_BYTES = 1024 * 1024
"""Of the texts of those that nobody may be using; what they compile to is some ten times as much."""

LoadVocabulary = Callable[[], LLTokenizer]


class GrammarCompiler:
    """Owned by the event loop. `load_vocabulary` is called with the first grammar; None: this worker has none."""

    def __init__(self, load_vocabulary: LoadVocabulary | None) -> None:
        self._load_vocabulary = load_vocabulary
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[Structured, LLMatcher] = OrderedDict()
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def compile(self, structured: Structured) -> LLMatcher:
        """A matcher to be copied. Raises GrammarError, whose text is for the client."""
        matcher = self._kept.get(structured)
        if matcher is None:
            matcher = await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, structured)
            self._keep(structured, matcher)
        else:
            self._kept.move_to_end(structured)
        return matcher

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, structured: Structured) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        return compile_grammar(structured, self._vocabulary)

    def _load(self) -> LLTokenizer:
        if self._load_vocabulary is None:
            raise GrammarError("the workers of this model serve no structured output")
        try:
            return self._load_vocabulary()
        except (OSError, ValueError) as error:
            log.error("no_vocabulary", error=str(error), effect="no structured output")
            raise GrammarError("the workers of this model have no tokenizer that structured output can use") from None

    def _keep(self, structured: Structured, matcher: LLMatcher) -> None:
        if structured not in self._kept:
            self._kept_bytes += len(structured.text)
        self._kept[structured] = matcher
        while len(self._kept) > MAX_KEPT or self._kept_bytes > MAX_KEPT_BYTES:
            oldest, _ = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.text)
