"""What the log shows, and what it never does."""

import subprocess
import sys

import pytest

PROGRAM = """
import structlog
from shared.telemetry.logs import configure_logs

configure_logs("router", "router-1", "FORMAT")

def fail(prompt):
    raise ValueError("a bug")

try:
    fail("my " + "secret" + " prompt")
except ValueError as error:
    structlog.get_logger("x").error("handler_failed", exc_info=error)
"""


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_shows_the_error_and_no_local_variable(format: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("FORMAT", format)], capture_output=True, text=True, check=True
    )
    assert "handler_failed" in done.stderr
    assert "a bug" in done.stderr
    assert "router-1" in done.stderr
    assert "my secret prompt" not in done.stderr
    assert done.stdout == ""
