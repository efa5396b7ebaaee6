"""Refusals as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Iterable, Mapping

import msgspec

from shared.outcome import Refusal

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""By HTTP status; any other below 500 is an invalid_request_error, above a server_error."""
CODES = {"prompt_too_long": "context_length_exceeded", "unauthenticated": "invalid_api_key"}
"""Where OpenAI has a word of its own for one of our refusals."""
PARAMS = {"chat": "messages", "chat.messages": "messages", "token_ids": "prompt", "input": "prompt"}
"""Where a field has another name over HTTP; elsewhere it goes without its group."""

_GROUP = re.compile(r"^(sampling|stopping|response)\.")

Headers = list[tuple[str, str]]


class Problem(msgspec.Struct, frozen=True):
    """An answer that is an error."""

    status: int
    body: bytes
    headers: Headers = []


def problem(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Iterable[tuple[str, str]] = (),
) -> Problem:
    """An error of the door itself, or of what is behind it."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Problem(status, msgspec.json.encode({"error": error}), list(headers))


def problem_of(refusal: Refusal, params: Mapping[str, str] | None = None) -> Problem:
    """A refusal with its field as the client called it. `params` are further names of fields."""
    known = {refusal.field: _GROUP.sub("", refusal.field), **PARAMS, **(params or {})}
    called = renamed(refusal, known)
    param = "model" if refusal.name == "model_not_found" else called.field or None
    code, headers = CODES.get(refusal.name, refusal.name), _retry(refusal.retry_after_ms)
    return problem(refusal.kind.http_status, called.message, param=param, code=code, headers=headers)


def renamed(refusal: Refusal, params: Mapping[str, str]) -> Refusal:
    """With another name for its field, where `params` has one: in its message too, which begins with it."""
    field, message = params.get(refusal.field, refusal.field), refusal.message
    if field and message.startswith(refusal.field + ":"):
        message = field + message[len(refusal.field) :]
    return msgspec.structs.replace(refusal, field=field, message=message)


def _retry(after_ms: int) -> Headers:
    """When to try again, in whole seconds as the standard wants it, and as OpenAI's clients read it first."""
    if not after_ms:
        return []
    return [("retry-after", str(-(-after_ms // 1000))), ("retry-after-ms", str(after_ms))]


_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)


def plainly(error: msgspec.ValidationError) -> tuple[str, str]:
    """The field that a body is wrong at, and what is wrong with it."""
    match = _AT.match(str(error))
    assert match is not None  # it matches anything
    path = (match["path"] or "").removeprefix(".")
    what = match["what"]
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing:
        return ".".join(filter(None, (path, missing[1]))), "is needed"
    return path, what[:1].lower() + what[1:]
