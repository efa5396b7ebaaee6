"""Structured output as a request asks for it: understood and bounded when it arrives, compiled on a thread later."""

from collections.abc import Mapping
from typing import Any

import msgspec

from services.router.limits import check_depth, invalid
from services.router.model import ServedModel
from shared.outcome import refuse
from shared.structured import KINDS, Structured
from shared.text.grammar import GrammarError, check

MAX_BYTES = 128 * 1024
"""Of a schema, an expression, a grammar, or all options together."""
MAX_OPTIONS = 4096
OPTIONS_KEY = "x-guidance"
"""llguidance takes options from a schema's root, among them to pass over keywords that it does not know."""


def structured_of(
    given: Mapping[str, Any], model: ServedModel, *, min_tokens: int, ignore_eos: bool
) -> Structured | None:
    """The one constraint that `given` names by its kind (KINDS): True for "json_object", a list of strings for
    "choice", else a text. None for nothing. Raises RefusedError, naming the field `structured.<kind>`.

    A stop string or a stop token ends the answer where it stands, complete or not.
    """
    if not given:
        return None
    if len(given) > 1:
        raise invalid("structured", f"{' and '.join(sorted(given))} exclude each other; send one of them")
    (kind, value), *_ = given.items()
    field = f"structured.{kind}"
    if kind not in KINDS:
        raise invalid(field, f"is not known; one of {', '.join(KINDS)} is")
    if ignore_eos:
        raise invalid("stopping.ignore_eos", "an answer with a structure ends where that is complete; leave it out")
    if min_tokens:
        raise invalid("stopping.min_tokens", "an answer with a structure ends where that is complete; leave it out")
    if not model.eos_token_ids:
        raise refuse("unsupported", "this model has no end-of-sequence token to end a structure with", field=field)
    return Structured(kind, _text(kind, value, field))


def require_compiling(structured: Structured) -> None:
    """Raises RefusedError with the place that is wrong. Blocks, some seconds for the worst grammars."""
    try:
        check(structured)
    except GrammarError as error:
        raise invalid(f"structured.{structured.kind}", str(error)) from None


def _text(kind: str, value: Any, field: str) -> str:
    if kind == "json_object":
        if value is not True:
            raise invalid(field, "is true or left out")
        return ""
    if kind == "choice":
        return _choice(value, field)
    if not value:
        raise invalid(field, "is empty")
    _check_size(value, field)
    if kind == "json_schema":
        _check_schema(value, field)
    return value


def _choice(options: list[str], field: str) -> str:
    if not 1 <= len(options) <= MAX_OPTIONS:
        raise invalid(field, f"{len(options)} options; 1 to {MAX_OPTIONS} are allowed")
    if not all(options):
        raise invalid(field, "an option is empty")
    text = msgspec.json.encode(options).decode()
    _check_size(text, field)
    return text


def _check_size(text: str, field: str) -> None:
    if len(text) > MAX_BYTES or len(text.encode()) > MAX_BYTES:
        raise invalid(field, f"exceeds {MAX_BYTES} bytes")


def _check_schema(text: str, field: str) -> None:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise invalid(field, f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise invalid(field, "is not a JSON object")
    check_depth(field, schema)
    if OPTIONS_KEY in schema:
        raise invalid(field, f"at /{OPTIONS_KEY}: is not served, for it changes what a schema means; leave it out")
