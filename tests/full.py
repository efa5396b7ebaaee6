"""The full tier: the same tests at their full counts, a section per call, results committed beside them.

sh ops/scripts/test --full [SECTION]
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.counts import COUNTS

TESTS = Path(__file__).parent
RESULTS = TESTS / "results"

SECTIONS: dict[str, tuple[str, ...]] = {
    "core": ("scheduler",),
    "router": ("router", "text", "net"),
    "worker": ("worker", "kernels"),
    "models": ("models", "checkpoint", "demo_model"),
    "house": ("cli", "contracts", "config", "telemetry", "ops", "bench"),
    "cluster": ("cluster",),
    "faults": ("faults",),
    "fuzz": ("fuzz",),
}
"""Section → folders of tests. A test keeps every folder in exactly one of them."""


class Tally:
    """Counts outcomes and durations while pytest runs, and the counts that tests asked for."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.slowest: dict[str, float] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.outcome == "failed":
            self.failures.append(report.nodeid)
        if report.when == "call":
            self.slowest[report.nodeid] = report.duration


def run_section(section: str) -> int:
    """Runs one section and writes tests/results/SECTION.json. Returns pytest's exit code."""
    from tests import counts

    folders = [str(TESTS / name) for name in SECTIONS[section] if (TESTS / name).is_dir()]
    if not folders:
        print(f"{section}: no tests yet")
        return 0
    counts.ASKED.clear()
    tally, began = Tally(), time.monotonic()
    code = int(pytest.main(["--timeout=7200", *folders], plugins=[tally]))
    _write(section, code, tally, time.monotonic() - began)
    return code


def _write(section: str, code: int, tally: Tally, seconds: float) -> None:
    from tests import counts

    RESULTS.mkdir(exist_ok=True)
    result: dict[str, Any] = {
        "section": section,
        "exit_code": code,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "duration_s": round(seconds, 1),
        **tally.outcomes,
        "counts": {name: COUNTS[name][1] for name in sorted(counts.ASKED)},
        "failures": tally.failures,
        "slowest_s": {name: round(s, 1) for name, s in sorted(tally.slowest.items(), key=lambda item: -item[1])[:10]},
    }
    (RESULTS / f"{section}.json").write_text(json.dumps(result, indent=2) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=TESTS, capture_output=True, text=True).stdout.strip()


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in SECTIONS]
    if unknown:
        print(f"error: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    os.environ["SLUICE_TEST_TIER"] = "full"
    codes = []
    for section in arguments or list(SECTIONS):
        print(f"── {section} ──", flush=True)
        codes.append(run_section(section))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
