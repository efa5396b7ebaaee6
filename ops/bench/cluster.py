"""A cluster of our own, started as a user would start it, for a benchmark to talk to."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
TAIL_BYTES = 6000


class ClusterError(Exception):
    """The cluster did not start. `log`: what it said last, where its log is kept."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class Cluster:
    """`sluice up` with the given flags, ready once this is made. `start_s`: what that took. Raises ClusterError.

    `log`: where standard output and error go; None: nowhere.
    """

    def __init__(self, flags: Sequence[str], *, log: Path | None = None, timeout_s: float = START_TIMEOUT_S) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sluice-bench-")
        self._log = log
        self._ready = Path(self._folder.name) / "ready.json"
        arguments = ["up", "--grpc-port=0", f"--ready-file={self._ready}", *flags]
        self._command = [sys.executable, "-m", "services.cli.main", *arguments]
        begin = time.monotonic()
        with open(log or os.devnull, "wb") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_with_root(os.environ),
            )
        self._wait(begin + timeout_s)
        self.start_s = time.monotonic() - begin
        said = json.loads(self._ready.read_text())
        self.address: str = said["router"]
        self.pids: dict[str, int] = said["pids"]
        self.http: dict[str, str] = said["http"]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def log_tail(self) -> str:
        """The last of what it said, without what router and scheduler tell when all is well."""
        if self._log is None:
            return ""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if not _is_routine(line))[-TAIL_BYTES:]

    def close(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Asks it to stop, and kills it where that takes longer; the services die with their supervisor."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()

    def _wait(self, deadline: float) -> None:
        while not self._ready.exists():
            ended, late = not self.alive, time.monotonic() > deadline
            if ended or late:
                self.close(timeout_s=5)
                how = f"ended with code {self.process.returncode}" if ended else "was not ready in time"
                raise ClusterError(f"the cluster {how}: {' '.join(self._command)}", self.log_tail())
            time.sleep(0.1)


def _is_routine(line: str) -> bool:
    return line.startswith(("router", "scheduler")) and '"level": "info"' in line


def _with_root(environ: Mapping[str, str]) -> dict[str, str]:
    """Services run with -P, so that where Sluice is not installed only PYTHONPATH leads to it."""
    paths = [str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}
