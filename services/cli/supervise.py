"""Keeps a cluster's processes alive: starts them, restarts the ones that die, stops them in order.

The decision about a child that ended is a pure function (`judge`); the rest is its effects. Children are spawned, lead
process groups of their own (a Ctrl-C in the terminal reaches only the supervisor, which then stops them in order) and
die with the supervisor (`events.die_with`).
"""

import asyncio
import collections
import contextlib
import enum
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.cli.events import read_event

TAIL_LINES = 20
READ_BYTES = 64 * 1024
WATCHES = 30
"""Looks at a silent child before it is taken to hang."""
DRAIN_TIMEOUT_S = 1.0
"""How long the pipes of a child that ended may keep us: a grandchild could hold them open."""


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to keep. `stop_rank`: lower ranks stop first. `ends_cluster`: when it ends by itself, with exit code
    0 after having been ready (a router that was drained), the rest is stopped too."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = {}
    stop_rank: int = 0
    stop_timeout_s: float = 35.0
    ends_cluster: bool = False


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Delays double from the first to the longest while a child keeps dying within `quick_s` of its start or its
    readiness; a child that dies `max_failed_starts` times in a row without becoming ready is given up. One that gives
    no sign of life for `silent_s` any more hangs, and is killed."""

    first_delay_s: float = 0.2
    longest_delay_s: float = 5.0
    quick_s: float = 5.0
    max_failed_starts: int = 5
    silent_s: float = 30.0


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How one run of a child ended, and what came before."""

    name: str
    exit_code: int
    refusal: str = ""
    was_ready: bool = False
    """In this run."""
    ever_ready: bool = False
    lived_s: float = 0.0
    """Since it became ready or, if it did not, since its start."""
    quick_deaths: int = 0
    """In a row, before this one."""
    failed_starts: int = 0
    ends_cluster: bool = False


class Restart(msgspec.Struct, frozen=True):
    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    message: str


class Finish(msgspec.Struct, frozen=True):
    """The child did what it was asked to: stop the rest."""


Verdict = Restart | GiveUp | Finish


def judge(end: End, policy: RestartPolicy) -> Verdict:
    """What to do about a child that ended without being asked to by us."""
    if not end.ever_ready:
        if end.refusal:
            return GiveUp(f"{end.name}: {end.refusal}")
        if end.exit_code >= 0:
            return GiveUp(f"{end.name} {how(end.exit_code)} before it was ready")
    if end.ends_cluster and end.was_ready and end.exit_code == 0:
        return Finish()
    if not end.was_ready and end.failed_starts + 1 >= policy.max_failed_starts:
        reason = f": {end.refusal}" if end.refusal else ""
        return GiveUp(f"{end.name} {how(end.exit_code)}; {policy.max_failed_starts} starts in a row failed{reason}")
    quick = end.lived_s < policy.quick_s
    doublings = end.quick_deaths if quick else 0
    return Restart(min(policy.longest_delay_s, policy.first_delay_s * 2**doublings))


def how(exit_code: int) -> str:
    """How a process ended, for people."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = " (the system may be out of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


class Loading(msgspec.Struct, frozen=True):
    name: str
    done_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True):
    name: str
    data: dict[str, Any]
    restarted: bool


class AllReady(msgspec.Struct, frozen=True):
    """Every child is ready, for the first time."""


class Died(msgspec.Struct, frozen=True):
    name: str
    how: str
    restart_in_s: float


class Line(msgspec.Struct, frozen=True):
    """One line that a child wrote to its standard output or error."""

    name: str
    text: str


class Stopping(msgspec.Struct, frozen=True):
    names: tuple[str, ...]


Notice = Loading | Ready | AllReady | Died | Line | Stopping


class Outcome(msgspec.Struct, frozen=True):
    """How the cluster ended: 0 and no message when it was asked to."""

    exit_code: int
    message: str = ""
    tail: tuple[str, ...] = ()
    """The last lines of the child that is to blame."""


@enum.unique
class ChildState(enum.Enum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


@dataclass(slots=True)
class Child:
    """One kept process. Owned by the supervisor; others read."""

    spec: ServiceSpec
    state: ChildState = ChildState.WAITING
    process: asyncio.subprocess.Process | None = None
    since: float = 0.0
    """When it started or, once it is, became ready."""
    refusal: str = ""
    ever_ready: bool = False
    quick_deaths: int = 0
    failed_starts: int = 0
    beats: bool = False
    """It has begun to say that it lives, in this run."""
    heard: bool = False
    """It has said something since the watch looked last."""
    hung: bool = False
    """In this run: we killed it."""
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TAIL_LINES))

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self.process.pid if self.process and self.process.returncode is None else None


class Supervisor:
    """Runs the children of one cluster. Every method belongs to one event loop."""

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        observe: Callable[[Notice], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        self.children = {spec.name: Child(spec) for spec in specs}
        self._observe = observe
        self._policy = policy or RestartPolicy()
        self._stop_asked = asyncio.Event()
        self._outcome: Outcome | None = None
        self._all_ready = False

    def request_stop(self) -> None:
        """The first call stops all in order, the second at once. For signal handlers."""
        if self._stop_asked.is_set():
            self.kill()
        self._end(Outcome(0))

    def kill(self) -> None:
        """SIGKILL to every child."""
        for child in self.children.values():
            if child.pid is not None:
                _signal(child, signal.SIGKILL)

    async def run(self) -> Outcome:
        """Keeps the children until asked to stop or until one is given up. Nothing is left when it returns."""
        keepers = [asyncio.create_task(self._keep(child), name=name) for name, child in self.children.items()]
        try:
            await self._stop_asked.wait()
            await self._stop_in_order()
            await asyncio.gather(*keepers)
        finally:
            self.kill()
            for keeper in keepers:
                keeper.cancel()
        return self._outcome or Outcome(1)

    def _end(self, outcome: Outcome) -> None:
        self._outcome = self._outcome or outcome
        self._stop_asked.set()

    async def _keep(self, child: Child) -> None:
        try:
            while not self._stop_asked.is_set():
                exit_code = await self._run_once(child)
                if self._stop_asked.is_set():
                    return
                await self._act(child, exit_code)
        except Exception as error:  # a bug of ours must not leave the others unattended
            self._end(Outcome(1, f"supervising {child.spec.name} failed: {error!r}"))

    async def _act(self, child: Child, exit_code: int) -> None:
        was_ready = child.state is ChildState.READY
        child.state = ChildState.ENDED
        end = End(
            name=child.spec.name,
            exit_code=exit_code,
            refusal=child.refusal,
            was_ready=was_ready,
            ever_ready=child.ever_ready,
            lived_s=time.monotonic() - child.since,
            quick_deaths=child.quick_deaths,
            failed_starts=child.failed_starts,
            ends_cluster=child.spec.ends_cluster,
        )
        match judge(end, self._policy):
            case GiveUp(message):
                self._end(Outcome(1, message, () if child.refusal else tuple(child.tail)))
            case Finish():
                self._end(Outcome(0))
            case Restart(delay_s):
                child.quick_deaths = child.quick_deaths + 1 if end.lived_s < self._policy.quick_s else 0
                child.failed_starts = 0 if was_ready else child.failed_starts + 1
                why = f"hung for {self._policy.silent_s:g} s and was killed" if child.hung else how(exit_code)
                self._tell(Died(child.spec.name, why, delay_s))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop_asked.wait(), delay_s)

    async def _run_once(self, child: Child) -> int:
        """One run of the child, from its start to its end."""
        read_fd, write_fd = os.pipe()
        events = asyncio.StreamReader()
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.argv,
                f"--event-fd={write_fd}",
                f"--parent-pid={os.getpid()}",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(write_fd,),
                env={**os.environ, **child.spec.environ},
                process_group=0,
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        child.state, child.refusal, child.since = ChildState.STARTING, "", time.monotonic()
        child.beats = child.hung = False
        if self._stop_asked.is_set():  # asked while it was being spawned
            _signal(child, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        pipe, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(events), os.fdopen(read_fd, "rb", buffering=0)
        )
        assert child.process.stdout is not None
        pumps = [
            asyncio.create_task(self._pump_events(child, events)),
            asyncio.create_task(self._pump_lines(child, child.process.stdout)),
        ]
        watch = asyncio.create_task(self._watch(child))
        try:
            exit_code = await child.process.wait()
            await asyncio.wait(pumps, timeout=DRAIN_TIMEOUT_S)
            return exit_code
        finally:
            for task in (*pumps, watch):
                task.cancel()
            pipe.close()

    async def _watch(self, child: Child) -> None:
        """Kills the child once it hangs. Counts looks, not time: where we stood still ourselves, what was said
        meanwhile waits in the pipe."""
        silent_looks = 0
        while silent_looks < WATCHES:
            await asyncio.sleep(self._policy.silent_s / WATCHES)
            silent_looks = 0 if child.heard or not child.beats else silent_looks + 1
            child.heard = False
        child.hung = True
        _signal(child, signal.SIGKILL)

    async def _pump_events(self, child: Child, events: asyncio.StreamReader) -> None:
        async for line in _lines(events):
            event = read_event(line)
            if event is not None:
                self._on_event(child, event.name, event.data)

    def _on_event(self, child: Child, name: str, data: dict[str, Any]) -> None:
        child.heard = True
        if name == "alive":
            child.beats = True
        elif name == "loading":
            self._tell(Loading(child.spec.name, int(data.get("done_bytes", 0)), int(data.get("total_bytes", 0))))
        elif name == "refused":
            child.refusal = str(data.get("message", "refused to start"))
        elif name == "ready":
            restarted = child.ever_ready
            child.state, child.since, child.ever_ready = ChildState.READY, time.monotonic(), True
            self._tell(Ready(child.spec.name, data, restarted))
            if not self._all_ready and all(c.state is ChildState.READY for c in self.children.values()):
                self._all_ready = True
                self._tell(AllReady())

    async def _pump_lines(self, child: Child, output: asyncio.StreamReader) -> None:
        async for line in _lines(output):
            text = line.decode(errors="replace")
            child.tail.append(text)
            self._tell(Line(child.spec.name, text))

    def _tell(self, notice: Notice) -> None:
        """An observer that cannot write must not stop a pump: a child whose pipe is full stands still."""
        with contextlib.suppress(OSError, ValueError):
            self._observe(notice)

    async def _stop_in_order(self) -> None:
        for rank in sorted({child.spec.stop_rank for child in self.children.values()}):
            stopping = [c for c in self.children.values() if c.spec.stop_rank == rank and c.pid is not None]
            if stopping:
                self._tell(Stopping(tuple(child.spec.name for child in stopping)))
                await asyncio.gather(*(_stop(child) for child in stopping))


async def _stop(child: Child) -> None:
    assert child.process is not None
    _signal(child, signal.SIGTERM)
    try:
        await asyncio.wait_for(child.process.wait(), child.spec.stop_timeout_s)
    except TimeoutError:
        _signal(child, signal.SIGKILL)
        await child.process.wait()


def _signal(child: Child, signum: signal.Signals) -> None:
    assert child.process is not None
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(signum)


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a pipe, whatever their length; a very long one comes in pieces."""
    rest = b""
    while chunk := await reader.read(READ_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > READ_BYTES:
            yield rest
            rest = b""
    if rest:
        yield rest
