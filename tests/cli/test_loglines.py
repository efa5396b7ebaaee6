"""What a person at the terminal of `sluice up` sees of the services' logs."""

import json

import pytest

from services.cli.loglines import compact


def line(**fields: object) -> str:
    common = {"service": "sluice-router", "instance": "router-1", "level": "info", "timestamp": "2026-11-20T14:37:54Z"}
    return json.dumps(common | fields)


def shown(text: str, *, stopping: bool = False) -> str | None:
    found = compact(text, stopping=stopping)
    return found.plain if found is not None else None


def test_a_request_is_one_short_line() -> None:
    text = line(event="request", end="answered", finish_reasons=["stop"], total_ms=12.5)
    assert shown(text) == "request  end=answered  finish_reasons=stop  total_ms=12.5"


def test_what_only_informs_is_left_to_the_log_file() -> None:
    assert shown(line(event="worker_registered", worker="worker-1")) is None


def test_a_warning_is_shown_unless_the_cluster_stops() -> None:
    text = line(event="renew_failed", level="warning", code="UNAVAILABLE")
    assert shown(text) == "renew_failed  code=UNAVAILABLE"
    assert shown(text, stopping=True) is None


@pytest.mark.parametrize("stopping", [False, True])
def test_an_error_is_always_shown_with_what_was_raised_and_where(stopping: bool) -> None:
    raised = {"exc_type": "KeyError", "exc_value": "'x'", "frames": [{"filename": "a.py", "lineno": 7}]}
    text = shown(line(event="handler_failed", level="error", exception=[raised]), stopping=stopping)
    assert text is not None
    assert "handler_failed" in text
    assert "KeyError: 'x'  at a.py:7" in text


def test_what_is_no_log_line_is_shown_as_it_is() -> None:
    assert shown("Fatal Python error: Segmentation fault [red]") == "Fatal Python error: Segmentation fault [red]"
    assert shown("[1, 2]") == "[1, 2]"
