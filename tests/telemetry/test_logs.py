"""What the log shows, and what it never does."""

import asyncio
import importlib
import json
import subprocess
import sys

import pytest

from shared.config import RouterConfig, SchedulerConfig, WorkerConfig

PROGRAM = """
import structlog
from shared.telemetry.logs import configure_logs

configure_logs("sluice-router", "router-1", "FORMAT")

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


THREADS = """
import threading
import structlog
from shared.telemetry.logs import configure_logs

configure_logs("sluice-worker", "worker-1", "json")
thread = threading.Thread(target=structlog.get_logger("x").info, args=("from_a_thread",))
thread.start()
thread.join()
"""


def test_a_line_from_any_thread_names_the_service_and_its_instance() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert (line["event"], line["service"], line["instance"]) == ("from_a_thread", "sluice-worker", "worker-1")


class NamedError(Exception):
    """Ends a service as soon as it has said its name."""


@pytest.mark.parametrize(
    ("service", "config"), [("router", RouterConfig()), ("scheduler", SchedulerConfig()), ("worker", WorkerConfig())]
)
def test_every_service_goes_by_its_name_in_traces(monkeypatch, service: str, config: object) -> None:
    app = importlib.import_module(f"services.{service}.app")

    def configure(name: str, *args: str) -> None:
        raise NamedError(name)

    monkeypatch.setattr(app, "configure_logs", configure)
    with pytest.raises(NamedError, match=f"^sluice-{service}$"):
        asyncio.run(app.serve(config))
