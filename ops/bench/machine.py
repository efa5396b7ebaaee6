"""What was measured where, and how busy others were meanwhile."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil


def describe() -> dict[str, Any]:
    """Device, versions, commit and date, for a results file."""
    names = ("torch", "transformers", "grpcio", "tokenizers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


class OthersShare:
    """The CPU share of everybody else while a block runs: total busy time less that of the given process trees."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def __enter__(self) -> "OthersShare":
        self._busy, self._own, self._total = self._read()
        return self

    def __exit__(self, *exc: object) -> None:
        busy, own, total = self._read()
        elapsed = max(total - self._total, 1e-9)
        self.share = max(0.0, (busy - self._busy - (own - self._own)) / elapsed)
        self.own_cpu_s = own - self._own

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(times[:8])
        idle = times.idle + times.iowait
        return total - idle, sum(cpu_seconds(pid) for pid in self._pids), total


def exact_cpu_seconds(pid: int) -> float:
    """CPU time of a process's live threads to the nanosecond, where Linux tells it; `cpu_seconds` counts in ticks of
    10 ms."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, ValueError):
        return cpu_seconds(pid, children=False)


def cpu_seconds(pid: int, *, children: bool = True) -> float:
    """User and system time of a process, and of its live children."""
    process = psutil.Process(pid)
    tree = [process, *(process.children(recursive=True) if children else [])]
    return sum(sum(one.cpu_times()[:2]) for one in tree)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as info:
        return next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
