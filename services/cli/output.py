"""What the command line says when something is wrong: one sentence, and what to do."""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.cli.client import CallError, FieldError

REFUSED = 2
"""The exit code for something that the user can mend: flags, ports, models, memory."""

LESS_MEMORY = "take a smaller model or dtype, or bound the KV pool with --kv-cache-memory-bytes"
OURS = ("shared", "services", "kernels")


def fail(message: str) -> None:
    """Prints an error to standard error, coloured on a terminal."""
    mark = "\033[31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{mark} {message}", file=sys.stderr, flush=True)


def mute_stderr() -> None:
    """Standard error goes nowhere from now on: whoever read it has gone, or its disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def user_message(error: BaseException) -> str | None:
    """What to tell the user; None when the error is a bug and deserves its traceback.

    An exception type of ours is a sentence for the user (a port, a checkpoint, a setting); so is the end of memory.
    """
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return user_message(error.exceptions[0])
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's RuntimeError
        return f"not enough memory: {str(error) or 'the allocation failed'}; {LESS_MEMORY}"
    return str(error) if type(error).__module__.partition(".")[0] in OURS else None


def fail_call(error: "CallError") -> None:
    """Prints how a call ended: the status, the server's words, and when to try again."""
    notes = f" (field {error.field})" if error.field else ""
    if error.retry_after_ms:
        notes += f" (try again in {error.retry_after_ms / 1000:.1f} s)"
    fail(f"{error}{notes}")


def fail_field(error: "FieldError") -> None:
    """Prints which option has a value that no request can hold."""
    said = {"prompt": "the prompt", "messages": "the message"}
    option = said.get(error.field) or "--" + error.field.replace("_", "-")
    fail(f"{option} does not fit its field: {error.why}")
