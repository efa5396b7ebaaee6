"""`sluice router | scheduler | worker`: one service in this process, until SIGTERM."""

import asyncio
import importlib
import os
import sys
from typing import Annotated, Any

import typer

from services.cli.events import OnEvent, die_with, write_events
from services.cli.flags import KINDS, Kind, build, make_flags, with_flags
from services.cli.output import REFUSED, fail, user_message
from services.worker.environment import worker_environment

ConfigFile = Annotated[
    str, typer.Option("--config", envvar="SLUICE_CONFIG", metavar="FILE", help="A TOML file with settings.")
]
EventFd = Annotated[int, typer.Option("--event-fd", hidden=True)]
ParentPid = Annotated[int, typer.Option("--parent-pid", hidden=True)]
PeersOption = Annotated[str, typer.Option("--peers", hidden=True, help="FOLDER:INDEX:COUNT, see router_processes.py.")]

ABOUT = {
    "router": "Serve the edge: text outside, tokens inside.",
    "scheduler": "Serve the scheduler: it plans every step of its workers.",
    "worker": "Serve one device: it runs the scheduler's plans.",
}


def add_service(app: typer.Typer, section: str) -> None:
    """Adds `sluice SECTION` with one flag per field of its configuration."""
    kind: Kind = KINDS[section]

    def command(
        config: ConfigFile = "",
        event_fd: EventFd = -1,
        parent_pid: ParentPid = 0,
        peers: PeersOption = "",
        *,
        flags: dict[str, Any],
    ) -> None:
        if section == "worker":
            _start_again_with(worker_environment(os.environ))
        if parent_pid:
            die_with(parent_pid)
        on_event = write_events(event_fd) if event_fd >= 0 else _terminal_events(section)
        raise typer.Exit(run_service(section, file=config, flags=flags, on_event=on_event, peers=peers))

    command.__doc__ = ABOUT[section]
    command.__name__ = section
    app.command(section)(with_flags(command, make_flags([kind])))


def _start_again_with(added: dict[str, str]) -> None:
    """Replaces this process by itself with more environment; returns where there is nothing to add."""
    if added:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **added})


def run_service(section: str, *, file: str, flags: dict[str, Any], on_event: OnEvent, peers: str = "") -> int:
    """Runs the service and returns its exit code. What a user can mend is one sentence, not a traceback."""
    try:
        config = build(section, file=file, flags=flags)
        if section == "router" and config.router_processes > 1 and not peers:
            from services.cli.router_processes import run_processes

            return run_processes(config, file=file, flags=flags, on_event=on_event)
        app = importlib.import_module(f"services.{section}.app")
        place = {"place": _place_of(peers)} if peers else {}
        return _run(app.serve(config, on_event=on_event, **place))
    except (Exception, KeyboardInterrupt) as error:
        message = user_message(error)
        if message is None:
            raise
        on_event("refused", {"message": message})
        fail(message)
        return REFUSED


def _place_of(peers: str) -> Any:
    from services.router.peers import PeerPlace

    folder, index, count = peers.rsplit(":", 2)
    return PeerPlace(folder, int(index), int(count))


def _run(serving: Any) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serving)
    return uvloop.run(serving)


def _terminal_events(section: str) -> OnEvent:
    """Progress and the ready line of a service that a person started by itself."""

    def on_event(name: str, data: dict[str, Any]) -> None:
        if name == "ready":
            where = "  ".join(f"{key} {value}" for key, value in data.items())
            print(f"sluice {section} is ready  {where}", file=sys.stderr, flush=True)
        elif name == "loading" and sys.stderr.isatty() and data.get("total_bytes"):
            percent = 100 * data["done_bytes"] // data["total_bytes"]
            end = "\n" if percent >= 100 else ""
            print(f"\rloading the checkpoint {percent:3d} %", end=end, file=sys.stderr, flush=True)

    return on_event
