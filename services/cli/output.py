"""What the command line says when something is wrong: one sentence, and what to do."""

import sys
from typing import TYPE_CHECKING

from shared.config import ConfigError

if TYPE_CHECKING:
    from services.cli.client import CallError

REFUSED = 2
"""The exit code for something that the user can mend: flags, ports, models, memory."""


def fail(message: str) -> None:
    """Prints an error to standard error, coloured on a terminal."""
    mark = "\033[31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{mark} {message}", file=sys.stderr, flush=True)


def user_message(error: BaseException) -> str | None:
    """What to tell the user; None when the error is a bug and deserves its traceback.

    Errors that users cause are known by their type: configuration, binding, refusals, checkpoints, memory.
    """
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return f"not enough memory: {error or 'take a smaller model, or give it less with --kv-cache-memory-bytes'}"
    return str(error) if type(error).__name__ in _user_errors() else None


def _user_errors() -> frozenset[str]:
    """By name, so that asking costs no import of grpc or torch."""
    return frozenset({"BindError", "RefusedError", "CheckpointError", "ModelError", "WorkerError"})


def fail_call(error: "CallError") -> None:
    """Prints how a call ended: the status, the server's words, and when to try again."""
    notes = f" (field {error.field})" if error.field else ""
    if error.retry_after_ms:
        notes += f" (try again in {error.retry_after_ms / 1000:.1f} s)"
    fail(f"{error}{notes}")
