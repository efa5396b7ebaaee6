"""The one table of what a request may ask for. Every numeric field of a request has its row here."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from shared.outcome import RefusedError, refuse


def number(value: float) -> str:
    """For people: an integer has all of its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


class Range(msgspec.Struct, frozen=True):
    """From `low` to `high`, both allowed unless `above` (then `low` itself is not)."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'from'} {number(self.low)} to {number(self.high)}"


MAX_U32 = 2**32 - 1
RANGES: dict[str, Range] = {
    "sampling.temperature": Range(0, 2),
    "sampling.top_p": Range(0, 1, above=True),
    "sampling.top_k": Range(0, 2**31 - 1),
    "sampling.min_p": Range(0, 1),
    "sampling.seed": Range(0, 2**64 - 1),
    "sampling.repetition_penalty": Range(0.01, 10),
    "sampling.presence_penalty": Range(-2, 2),
    "sampling.frequency_penalty": Range(-2, 2),
    "sampling.logit_bias": Range(-100, 100),
    "sampling.n": Range(1, 16),
    "stopping.max_tokens": Range(1, MAX_U32),
    "stopping.min_tokens": Range(0, MAX_U32),
    "response.logprobs": Range(0, 20),
    "response.prompt_logprobs": Range(0, 20),
    "priority": Range(-(2**31), 2**31 - 1),
}
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 256
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_BYTES = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_JSON_DEPTH = 32
MAX_JSON_BYTES = 256 * 1024
"""Of a JSON text in a field of its own: it is parsed on the loop, before there is a place for the request."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]+")


def invalid(field: str, message: str) -> RefusedError:
    """The exception to raise for a field that cannot be served."""
    return refuse("invalid_argument", f"{field}: {message}", field=field)


def too_long(field: str, size: str, max_model_len: int) -> RefusedError:
    """The exception for a prompt that leaves no room for a token of answer; `size` says how large it is."""
    message = f"{field}: {size}; this model takes {max_model_len} tokens with at least one of answer"
    return refuse("prompt_too_long", message, field=field)


def check_range(field: str, value: float) -> None:
    """Refuses a value outside its row, NaN and infinities included."""
    if value not in RANGES[field]:
        raise invalid(field, f"{number(value)} is not allowed; it goes {RANGES[field]}")


def check_depth(field: str, value: Any) -> None:
    """Refuses JSON whose arrays and objects are too many inside each other."""
    level, depth = [value], 0
    while level and depth <= MAX_JSON_DEPTH:
        depth += 1
        groups = (one.values() if isinstance(one, dict) else one for one in level)
        level = [child for group in groups for child in group if isinstance(child, dict | list)]
    if depth > MAX_JSON_DEPTH:
        raise invalid(field, f"nests deeper than {MAX_JSON_DEPTH} levels")


def is_request_id(text: str) -> bool:
    return len(text) <= MAX_REQUEST_ID_CHARS and REQUEST_ID.fullmatch(text) is not None


def check_request_id(request_id: str) -> None:
    if not is_request_id(request_id):
        raise invalid("request_id", f"1 to {MAX_REQUEST_ID_CHARS} letters, digits and . _ : / + = @ - are allowed")


def check_cache_salt(cache_salt: str) -> None:
    if len(cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        raise invalid("cache_salt", f"exceeds {MAX_CACHE_SALT_BYTES} bytes")


class Limits(msgspec.Struct, frozen=True):
    """The rows that depend on the model."""

    vocab_size: int

    def check_token_ids(self, field: str, token_ids: Collection[int]) -> None:
        if token_ids and max(token_ids) >= self.vocab_size:
            raise invalid(field, f"token ids are below the vocabulary's size, {self.vocab_size}")

    def check_logit_bias(self, entries: Mapping[int, float]) -> None:
        field = "sampling.logit_bias"
        if len(entries) > MAX_LOGIT_BIAS_ENTRIES:
            raise invalid(field, f"{len(entries)} entries; {MAX_LOGIT_BIAS_ENTRIES} are allowed")
        for bias in entries.values():
            check_range(field, bias)
        self.check_token_ids(field, entries)

    def check_stop(self, stop: Sequence[str], stop_token_ids: Collection[int]) -> None:
        if len(stop) > MAX_STOP_STRINGS:
            raise invalid("stopping.stop", f"{len(stop)} stop strings; {MAX_STOP_STRINGS} are allowed")
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise invalid("stopping.stop_token_ids", f"{MAX_STOP_TOKEN_IDS} stop token ids are allowed")
        if any(not string or len(string.encode()) > MAX_STOP_BYTES for string in stop):
            raise invalid("stopping.stop", f"a stop string has 1 to {MAX_STOP_BYTES} bytes")
        self.check_token_ids("stopping.stop_token_ids", stop_token_ids)
