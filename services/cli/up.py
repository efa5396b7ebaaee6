"""`sluice up`: a local cluster in one command, supervised."""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn
from rich.text import Text

from services.cli.cluster import Cluster, plan_cluster, up_flags
from services.cli.flags import with_flags
from services.cli.loglines import compact
from services.cli.output import REFUSED, fail, mute_stderr
from services.cli.serve import ConfigFile
from services.cli.supervise import (
    AllReady,
    Died,
    Line,
    Loading,
    Notice,
    Outcome,
    Ready,
    Stopping,
    Supervisor,
)
from shared.config import ConfigError

ReadyFile = Annotated[
    str,
    typer.Option("--ready-file", metavar="FILE", help="Written (JSON: addresses, pids) once all services are ready."),
]
LogFile = Annotated[
    str, typer.Option("--log-file", metavar="FILE", help="Where the services' logs go instead of the terminal.")
]

COLOURS = {"router": "cyan", "scheduler": "magenta", "worker": "green"}


def add_up(app: typer.Typer) -> None:
    """Adds `sluice up` with the flags of all services."""
    app.command("up")(with_flags(up, up_flags()))


def up(
    config: ConfigFile = "",
    ready_file: ReadyFile = "",
    log_file: LogFile = "",
    *,
    flags: dict[str, Any],
) -> None:
    """Start a local cluster: router, scheduler and worker(s) as separate processes; Ctrl-C stops it.

    A flag goes to every service that knows it; `--host` opens the router only. Every flag has a SLUICE_… variable and
    a key in the TOML file.
    """
    raise typer.Exit(start(flags, config=config, ready_file=ready_file, log_file=log_file))


def start(
    flags: dict[str, Any],
    *,
    config: str = "",
    ready_file: str = "",
    log_file: str = "",
    meanwhile: Callable[[Cluster], Awaitable[int]] | None = None,
) -> int:
    """Runs a cluster until a signal, until a child is given up or, with `meanwhile`, until that has returned its exit
    code. Returns the exit code."""
    try:
        cluster = plan_cluster(flags, file=config)
        _require_writable(ready_file, flag="--ready-file")
        with _open_log(log_file) as log:
            return asyncio.run(_supervise(cluster, View(cluster, log, ready_file), meanwhile))
    except ConfigError as error:
        fail(str(error))
        return REFUSED


@contextlib.contextmanager
def _open_log(path: str) -> Iterator[TextIO | None]:
    if not path:
        yield None
        return
    try:
        log = open(path, "a", buffering=1)  # noqa: SIM115 - closed below, where a full disk is no news
    except OSError as error:
        raise ConfigError(f"cannot write --log-file {path}: {error.strerror}") from None
    try:
        yield log
    finally:
        with contextlib.suppress(OSError):
            log.close()


def _require_writable(path: str, *, flag: str) -> None:
    """Raises ConfigError where no file can be put at `path`, before anything is started."""
    if not path:
        return
    partial = _partial(Path(path))
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {flag} {path}: {error.strerror}") from None


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".partial")


class Screen(Console):
    """Standard error. Rich's own console ends the process when its reader has gone."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute_stderr()


class View:
    """What a person sees of the cluster: progress, the ready line, restarts, and the services' own lines."""

    def __init__(self, cluster: Cluster, log: TextIO | None, ready_file: str) -> None:
        self.supervisor = Supervisor(cluster.specs, self.observe)
        self.ready = asyncio.Event()
        self._cluster = cluster
        self._log = log
        self._ready_file = Path(ready_file) if ready_file else None
        self._console = Screen()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=self._console, transient=True
        )
        self._tasks: dict[str, TaskID] = {}
        self._stopping = False

    def observe(self, notice: Notice) -> None:
        """Shows it. Once nobody reads standard error any more, it goes on in silence."""
        try:
            self._show(notice)
        except (OSError, ValueError):
            mute_stderr()

    def _show(self, notice: Notice) -> None:
        match notice:
            case Loading():
                self._show_loading(notice)
            case Line(name, text):
                self._show_line(name, text)
            case Died(name, how, restart_in_s):
                self._say(f"[yellow]{name} {how}; starting it again in {restart_in_s:.1f} s[/]")
                self._end_progress(name)
            case Ready(name, _, restarted):
                self._end_progress(name)
                if restarted:
                    self._say(f"[green]{name} is ready again[/]")
                self._write_ready_file()
            case AllReady():
                self.ready.set()
                self._say(self.ready_line())
                self._write_ready_file()
            case Stopping(names):
                self._stopping = True
                self._stop_progress()
                self._say(f"stopping {', '.join(names)}")

    def ready_line(self) -> str:
        workers = ", ".join(self._cluster.workers)
        return (
            f"[bold green]sluice is ready[/]  gRPC [bold]{self._cluster.router}[/]  "
            f"HTTP {self._cluster.http['router']}  "
            f"scheduler {self._cluster.scheduler}  worker {workers}  model {self._cluster.model}"
        )

    def close(self) -> None:
        self._stop_progress()
        if self._ready_file:
            self._ready_file.unlink(missing_ok=True)

    def report(self, outcome: Outcome) -> None:
        """Says why the cluster ended, when nobody asked it to."""
        if outcome.message:
            try:
                for line in outcome.tail if self._log else ():
                    print(line, file=sys.stderr)
                fail(outcome.message)
            except OSError:
                mute_stderr()

    def _say(self, text: str) -> None:
        self._console.print(text)

    def _show_loading(self, notice: Loading) -> None:
        if not self._console.is_terminal or notice.total_bytes <= 0:
            return
        if notice.name not in self._tasks:
            self._progress.start()
            self._tasks[notice.name] = self._progress.add_task(f"{notice.name} loads", total=notice.total_bytes)
        self._progress.update(self._tasks[notice.name], completed=notice.done_bytes, total=notice.total_bytes)

    def _end_progress(self, name: str) -> None:
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self._stop_progress()

    def _stop_progress(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def _show_line(self, name: str, text: str) -> None:
        if self._log:
            self._write_log(f"{name} | {text}\n")
        elif self._console.is_terminal:
            line = compact(text, stopping=self._stopping)
            if line is not None:
                self._console.print(Text.assemble((name, COLOURS[name.partition("-")[0]]), " │ ", line))
        else:
            print(f"{name} | {text}", file=sys.stderr, flush=True)

    def _write_log(self, line: str) -> None:
        assert self._log is not None
        try:
            self._log.write(line)
        except (OSError, ValueError) as error:
            self._log = None
            fail(f"cannot write --log-file any more: {error}; the services' lines come here from now on")

    def _write_ready_file(self) -> None:
        if not (self._ready_file and self.ready.is_set()):
            return
        try:
            self._replace_ready_file(self._ready_file)
        except OSError as error:
            fail(f"cannot write --ready-file {self._ready_file}: {error.strerror}")

    def _replace_ready_file(self, path: Path) -> None:
        data = {
            "router": self._cluster.router,
            "scheduler": self._cluster.scheduler,
            "workers": self._cluster.workers,
            "http": self._cluster.http,
            "pids": {name: child.pid for name, child in self.supervisor.children.items()},
        }
        partial = _partial(path)
        partial.write_bytes(msgspec.json.encode(data))
        partial.replace(path)


async def _supervise(cluster: Cluster, view: View, meanwhile: Callable[[Cluster], Awaitable[int]] | None) -> int:
    supervisor = view.supervisor
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, supervisor.request_stop)
    running = asyncio.create_task(supervisor.run())
    try:
        async with _alongside(meanwhile, cluster, view) as work:
            if work is not None:
                await asyncio.wait((running, work), return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    supervisor.request_stop()
            outcome = await running
        view.report(outcome)
        if outcome.exit_code == 0 and work is not None and work.done() and not work.cancelled():
            return work.result()
        return outcome.exit_code
    finally:
        view.close()


@contextlib.asynccontextmanager
async def _alongside(
    meanwhile: Callable[[Cluster], Awaitable[int]] | None, cluster: Cluster, view: View
) -> AsyncIterator[asyncio.Task[int] | None]:
    """Runs `meanwhile` once the cluster is ready; it ends with the block."""
    if meanwhile is None:
        yield None
        return

    async def work() -> int:
        await view.ready.wait()
        return await meanwhile(cluster)

    task = asyncio.create_task(work())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
