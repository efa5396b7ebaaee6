"""Vocabularies and matchers of small tokenizers."""

from functools import cache

from llguidance import LLMatcher, LLTokenizer

from shared.structured import Structured
from shared.text.detokenizer import TokenTexts
from shared.text.grammar import compile_grammar, load_vocabulary
from tests.builders import tokenizers

TWIN_LOGITS = 384
"""Of the twins of tests.models.twins: some more than a tokenizer here has tokens."""


@cache
def vocabulary(kind: str = "byte_level", num_logits: int = TWIN_LOGITS, eos: int = 2) -> LLTokenizer:
    return load_vocabulary(getattr(tokenizers, kind)().to_str(), num_logits, {eos})


@cache
def token_bytes(kind: str) -> tuple[bytes, ...]:
    """What each token adds to an answer; nothing for special ones."""
    backend = getattr(tokenizers, kind)()
    special = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
    texts = TokenTexts(backend)
    return tuple(b"" if i in special else texts.token_bytes(i) for i in range(texts.size))


def matcher(kind: str, text: str = "", tokenizer: str = "byte_level", num_logits: int = TWIN_LOGITS) -> LLMatcher:
    return compile_grammar(Structured(kind, text), vocabulary(tokenizer, num_logits))
