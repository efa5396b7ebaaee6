"""Everything that only a GPU can tell, section by section.

    python -m ops.bench.gpu [--sections ceilings correctness ipc kernels decode engine peers] [--out FILE] [--dry-run]

Writes one JSON after every section, so that a run that is cut short keeps what it has. `--dry-run` goes through every
section on a CPU at toy sizes, the kernels interpreted; its figures mean nothing. Run it in the root of the repository.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops.bench.gpu.options import add_options

SECTIONS = ("ceilings", "correctness", "ipc", "kernels", "decode", "engine", "peers")
BESIDE_CEILINGS = ("kernels", "decode")
WITH_OPTIONS = ("engine", "peers")
ROOT = Path(__file__).resolve().parents[3]
DEFAULT_OUT = ROOT / "ops" / "bench" / "results" / "gpu.json"


def run_section(name: str, device: Any, result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A section's figures, or what stopped it."""
    section = importlib.import_module(f"ops.bench.gpu.{name}")
    begin = time.perf_counter()
    measure: Callable[..., dict[str, Any]] = section.measure
    more = [result["ceilings"]] if name in BESIDE_CEILINGS else [options] if name in WITH_OPTIONS else []
    try:
        found = measure(device, *more)
    except Exception as error:  # the sections after it must still run
        found = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return {**found, "section_s": round(time.perf_counter() - begin, 1)}


def show(name: str, found: dict[str, Any]) -> None:
    print(f"── {name} ──")
    for key, value in found.items():
        print(f"  {key:34} {json.dumps(value)[:400]}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    add_options(parser)
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    from ops.bench.gpu.device import describe, open_device

    device = open_device(options.dry_run)
    out = options.out or (None if options.dry_run else DEFAULT_OUT)
    result: dict[str, Any] = {
        **describe(device),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    wanted = ["ceilings", *options.sections] if set(BESIDE_CEILINGS) & set(options.sections) else options.sections
    for name in dict.fromkeys(wanted):
        result[name] = run_section(name, device, result, options)
        show(name, result[name])
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    failed = [problem for name in SECTIONS for problem in problems(name, result.get(name, {}))]
    print(f"failed: {'; '.join(failed)}" if failed else "every section ran")
    return 1 if failed else 0


def problems(name: str, found: dict[str, Any]) -> list[str]:
    """What went wrong in a section: the whole of it, its tests, one of its cases, or something that should be true."""
    if "error" in found or found.get("exit_code"):
        return [name]
    cases = [key for key, value in found.items() if isinstance(value, dict) and "error" in value]
    untrue = [key for key, value in found.items() if value is False]
    survived = ["dead_owner"] if found.get("dead_owner") == "opened" else []
    return [f"{name}: {key}" for key in (*cases, *untrue, *survived)]


def _commit() -> str:
    """Unknown where a copy has no history, or the machine no git."""
    try:
        told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
