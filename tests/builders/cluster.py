"""Real processes for tests: a whole cluster through `sluice up`, or single services.

Nothing here mocks anything. A test asks the `cluster` fixture (shared by configuration) or the `own_cluster` fixture
(its own, to be broken) of tests/conftest.py for one.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from services.cli.client import Client, Load
from services.cli.events import Event, read_event
from services.cli.flags import to_argv

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 5.0
TAIL_LINES = 60

SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 2**20, "threads": 1, "shutdown_timeout": 10.0}
"""What a cluster in a test has unless it says otherwise."""

FREE_PORT: dict[str, dict[str, Any]] = {
    "router": {"port": 0},
    "scheduler": {"metrics_port": 0},
    "worker": {"metrics_port": 0},
}
"""What keeps a single service off the published HTTP ports, which another test may hold."""

SLUICE = (sys.executable, "-m", "services.cli.main")


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str, pause_s: float = 0.02) -> None:
    """Polls. Raises AssertionError naming what did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(pause_s)


def is_alive(pid: int) -> bool:
    """Of a process that runs: one that is gone, or dead and not yet collected, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class RunningCluster:
    """`sluice up` and what it started, on free ports. `folder` keeps its log and its ready file."""

    def __init__(self, folder: Path, flags: dict[str, Any], *, supervised: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.flags = {**SMALL, **flags}
        self.log_file = folder / "cluster.log"
        self._ready_file = folder / "ready.json"
        self._output = folder / "up.log"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *SLUICE,
                    "up",
                    "--grpc-port=0",
                    f"--ready-file={self._ready_file}",
                    f"--log-file={self.log_file}",
                    *to_argv(self.flags),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._seen: dict[int, psutil.Process] = {}
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every service has said that it is ready. Raises AssertionError with the cluster's own words."""
        deadline = time.monotonic() + timeout_s
        while not self._ready_file.exists():
            code = self.process.poll()
            assert code is None, f"`sluice up` ended with {code}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the cluster is not ready:\n{self.tail()}"
            time.sleep(0.02)
        self.remember_processes()

    @property
    def ready(self) -> dict[str, Any]:
        """Addresses and pids, as `--ready-file` says them now."""
        return json.loads(self._ready_file.read_bytes())

    @property
    def address(self) -> str:
        """Of the router."""
        return self.ready["router"]

    def http(self, name: str) -> str:
        """Where router, scheduler, worker-0, … answer /metrics."""
        return self.ready["http"][name]

    def pid(self, name: str) -> int:
        """Of router, scheduler, worker-0, …; a restarted one has another."""
        return self.ready["pids"][name]

    def client(self) -> Client:
        """A new client; the caller's event loop owns it."""
        return Client(self.address)

    def load(self) -> Load:
        """What Control.GetLoad of the router says now."""

        async def ask() -> Load:
            async with self.client() as client:
                return await client.load()

        return asyncio.run(ask())

    def kill_service(self, name: str, signum: signal.Signals = signal.SIGKILL) -> int:
        """Signals one service and returns its pid; after SIGKILL it is proven dead."""
        self.remember_processes()
        pid = self.pid(name)
        os.kill(pid, signum)
        if signum == signal.SIGKILL:
            wait_for(lambda: not is_alive(pid), 5, f"{name} (pid {pid}) is dead")
        return pid

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float = 60) -> int:
        """Until `name` is ready again as another process; returns its pid."""

        def restarted() -> bool:
            return self.pid(name) not in (old_pid, None)

        wait_for(restarted, timeout_s, f"{name} is ready again")
        self.remember_processes()
        return self.pid(name)

    def assert_idle(self, timeout_s: float = IDLE_TIMEOUT_S) -> None:
        """The ledger of blocks is whole and nobody holds any: free + cached = total, referenced = 0."""
        load: Load | None = None

        def idle() -> bool:
            nonlocal load
            load = self.load()
            return not load.requests_in_flight and all(
                not (g.requests_running or g.requests_waiting or g.kv_blocks_referenced) for g in load.groups
            )

        with contextlib.suppress(AssertionError):
            wait_for(idle, timeout_s, "idle", pause_s=0.05)
        assert load is not None
        assert load.requests_in_flight == 0, load
        for group in load.groups:
            assert group.requests_running == group.requests_waiting == group.kv_blocks_referenced == 0, group
            assert group.kv_blocks_free + group.kv_blocks_cached == group.kv_blocks_total > 0, group

    def remember_processes(self) -> None:
        """Notes what belongs to the cluster now, so that `stop` can prove it gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child

    def survivors(self) -> list[psutil.Process]:
        """Processes of the cluster that run still."""
        return [child for child in self._seen.values() if child.is_running() and is_alive(child.pid)]

    def stop(self, signum: signal.Signals = signal.SIGINT) -> int:
        """As Ctrl-C would. Returns the exit code; asserts that no process is left."""
        self.remember_processes()
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"`sluice up` did not stop:\n{self.tail()}") from None
        left = self.survivors()
        assert not left, f"left behind: {left}"
        return code

    def kill(self) -> None:
        """Everything, at once: for the end of a test that failed."""
        self.remember_processes()
        for process in (
            psutil.Process(self.process.pid) if self.process.poll() is None else None,
            *self._seen.values(),
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process is not None:
                    process.kill()
        self.process.wait()

    def log(self) -> str:
        """What the services wrote."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def tail(self) -> str:
        """The last lines of the supervisor and of the services."""
        said = self._output.read_text(errors="replace")
        lines = [*said.splitlines()[-TAIL_LINES:], f"--- {self.log_file}", *self.log().splitlines()[-TAIL_LINES:]]
        return "\n".join(lines)


class RunningService:
    """One service as `sluice router|scheduler|worker` runs it, told of by its events."""

    def __init__(
        self, service: str, folder: Path, flags: dict[str, Any], environ: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.service = service
        self.events: list[Event] = []
        self.log_file = folder / f"{service}-{time.monotonic_ns()}.log"
        read_fd, write_fd = os.pipe()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *SLUICE,
                    service,
                    *to_argv({**FREE_PORT[service], **flags}),
                    f"--event-fd={write_fd}",
                    f"--parent-pid={os.getpid()}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                env={**os.environ, **(environ or {})},
            )
        os.close(write_fd)
        self._reader = threading.Thread(target=self._read, args=(read_fd,), daemon=True)
        self._reader.start()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, "rb") as pipe:
            for line in pipe:
                event = read_event(line)
                if event is not None:
                    self.events.append(event)

    def wait_event(self, name: str, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """The data of the last event of that name, once there is one."""

        def came() -> bool:
            if any(event.name == name for event in self.events):
                return True
            assert self.process.poll() is None, f"{self.service} ended with {self.process.returncode}:\n{self.tail()}"
            return False

        wait_for(came, timeout_s, f"{self.service} says {name}")
        return next(event.data for event in reversed(self.events) if event.name == name)

    def stop(self, signum: signal.Signals = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Signals it, if it runs, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def tail(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-TAIL_LINES:])


@contextlib.contextmanager
def running(folder: Path, flags: dict[str, Any]) -> Iterator[RunningCluster]:
    """A cluster of one's own, stopped and looked after at the end; a failure on the way kills it."""
    cluster = RunningCluster(folder, flags)
    try:
        yield cluster
    except BaseException:
        cluster.kill()
        raise
    cluster.stop()
