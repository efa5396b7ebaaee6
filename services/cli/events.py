"""What a service tells the process that supervises it: JSON lines on an inherited pipe."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

OnEvent = Callable[[str, dict[str, Any]], None]

PR_SET_PDEATHSIG = 1
ALIVE_EVERY_S = 1.0
"""A service that is ready says so of its event loop: one that hangs ends by no signal."""


class Event(msgspec.Struct, frozen=True):
    """`name` is loading, ready, alive or refused; `data` is what the service said with it."""

    name: str
    data: dict[str, Any] = {}


def write_events(fd: int) -> OnEvent:
    """An on_event that writes to `fd`, and `alive` once a second from readiness on, while the running event loop turns.
    A supervisor that is gone is not an error here, and one that stands still and reads nothing keeps nobody waiting."""
    os.set_blocking(fd, False)
    encoder = msgspec.json.Encoder(enc_hook=str)
    beating = False

    def on_event(name: str, data: dict[str, Any]) -> None:
        nonlocal beating
        line = encoder.encode(Event(name, data)) + b"\n"
        try:
            os.write(fd, line)
        except OSError:
            return
        if name == "ready" and not beating:
            beating = True
            with contextlib.suppress(RuntimeError):  # said outside an event loop
                beat(asyncio.get_running_loop())

    def beat(loop: asyncio.AbstractEventLoop) -> None:
        on_event("alive", {})
        loop.call_later(ALIVE_EVERY_S, beat, loop)

    return on_event


def read_event(line: bytes) -> Event | None:
    """The event of one line; None for anything else."""
    try:
        return msgspec.json.decode(line, type=Event)
    except msgspec.MsgspecError:
        return None


def die_with(parent_pid: int) -> None:
    """Ends this process when its supervisor ends, even by SIGKILL. Call before anything else is started."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent_pid,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent_pid:
        os._exit(1)


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
