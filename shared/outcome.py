"""How requests end: finish reasons, and the one table of refusals (name → gRPC → HTTP → may retry)."""

import enum

import msgspec


@enum.unique
class FinishReason(enum.Enum):
    """Why a sample ended. Each sample ends with exactly one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@enum.unique
class AbortCause(enum.Enum):
    """Why a request, or one sample of it, was ended early."""

    CLIENT = "client"
    STOP_STRING = "stop_string"
    DEADLINE = "deadline"
    STALLED = "stalled"
    DRAIN = "drain"


class RefusalKind(msgspec.Struct, frozen=True):
    """One row of the table: `grpc_status` is the name of a grpc.StatusCode."""

    name: str
    grpc_status: str
    http_status: int
    may_retry: bool


REFUSALS: dict[str, RefusalKind] = {
    kind.name: kind
    for kind in (
        RefusalKind("invalid_argument", "INVALID_ARGUMENT", 400, False),
        RefusalKind("message_too_large", "INVALID_ARGUMENT", 413, False),
        RefusalKind("prompt_too_long", "INVALID_ARGUMENT", 400, False),
        RefusalKind("exceeds_kv_pool", "INVALID_ARGUMENT", 400, False),
        RefusalKind("unsupported", "FAILED_PRECONDITION", 400, False),
        RefusalKind("model_not_found", "NOT_FOUND", 404, False),
        RefusalKind("lease_not_found", "NOT_FOUND", 404, True),
        RefusalKind("request_id_in_use", "ALREADY_EXISTS", 409, False),
        RefusalKind("unauthenticated", "UNAUTHENTICATED", 401, False),
        RefusalKind("permission_denied", "PERMISSION_DENIED", 403, False),
        RefusalKind("quota_exceeded", "RESOURCE_EXHAUSTED", 429, True),
        RefusalKind("queue_full", "RESOURCE_EXHAUSTED", 429, True),
        RefusalKind("client_stalled", "RESOURCE_EXHAUSTED", 429, False),
        RefusalKind("deadline_unreachable", "DEADLINE_EXCEEDED", 504, False),
        RefusalKind("deadline_exceeded", "DEADLINE_EXCEEDED", 504, False),
        RefusalKind("cancelled", "CANCELLED", 499, False),
        RefusalKind("draining", "UNAVAILABLE", 503, True),
        RefusalKind("no_scheduler", "UNAVAILABLE", 503, True),
        RefusalKind("no_worker", "UNAVAILABLE", 503, True),
        RefusalKind("worker_lost", "UNAVAILABLE", 503, True),
        RefusalKind("scheduler_lost", "UNAVAILABLE", 503, True),
        RefusalKind("step_failed", "INTERNAL", 500, True),
        RefusalKind("internal", "INTERNAL", 500, False),
    )
}
"""Every way in which a request ends without an answer."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A request's end without an answer, as a value.

    `message` is for the client and says what to do; `field` names the offending field where there is one;
    `retry_after_ms` is set where trying again may help.
    """

    name: str
    message: str
    field: str = ""
    retry_after_ms: int = 0

    def __post_init__(self) -> None:
        if self.name not in REFUSALS:
            raise ValueError(f"unknown refusal {self.name!r}")

    @property
    def kind(self) -> RefusalKind:
        return REFUSALS[self.name]


class RefusedError(Exception):
    """Carries a Refusal up to the edge."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refuse(name: str, message: str, *, field: str = "", retry_after_ms: int = 0) -> RefusedError:
    """The exception to raise for a named refusal."""
    return RefusedError(Refusal(name=name, message=message, field=field, retry_after_ms=retry_after_ms))
