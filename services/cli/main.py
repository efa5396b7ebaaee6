"""The `sluice` command. Each command's own imports wait until it runs, so that `--help` is quick."""

import os
import sys
from collections.abc import Callable

import typer

ABOUT = "Sluice serves large language models over gRPC: a router, a scheduler, and one worker per device."


def build_app(command: str) -> typer.Typer:
    """The app; of the commands whose flags are generated only `command` gets them, unless none is named."""
    app = typer.Typer(
        name="sluice",
        help=ABOUT,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,  # rich's tables cut the names of flags on a narrow terminal
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            from shared import __version__

            print(f"sluice {__version__}")
            raise typer.Exit

    for name, add in COMMANDS.items():
        if command in (name, ""):
            add(app)
        else:
            _announce(app, name)
    return app


def _announce(app: typer.Typer, name: str) -> None:
    """A command as `sluice --help` lists it."""

    def never() -> None:
        raise AssertionError(name)

    app.command(name, short_help=SUMMARIES[name])(never)


def _up(app: typer.Typer) -> None:
    from services.cli.up import add_up

    add_up(app)


def _service(name: str) -> Callable[[typer.Typer], None]:
    def add(app: typer.Typer) -> None:
        from services.cli.serve import add_service

        add_service(app, name)

    return add


def _generate(app: typer.Typer) -> None:
    from services.cli.generate import generate

    app.command("generate")(generate)


def _chat(app: typer.Typer) -> None:
    from services.cli.chat import chat

    app.command("chat")(chat)


def _demo(app: typer.Typer) -> None:
    from services.cli.demo import add_demo

    add_demo(app)


def _doctor(app: typer.Typer) -> None:
    from services.cli.doctor import doctor

    app.command("doctor")(doctor)


def _trace(app: typer.Typer) -> None:
    from services.cli.trace import trace

    app.command("trace")(trace)


def _tune(app: typer.Typer) -> None:
    from services.cli.tune import tune

    app.command("tune")(tune)


COMMANDS: dict[str, Callable[[typer.Typer], None]] = {
    "up": _up,
    "router": _service("router"),
    "scheduler": _service("scheduler"),
    "worker": _service("worker"),
    "generate": _generate,
    "chat": _chat,
    "demo": _demo,
    "trace": _trace,
    "doctor": _doctor,
    "tune": _tune,
}

SUMMARIES = {
    "up": "Start a local cluster: router, scheduler and worker(s), supervised; Ctrl-C stops it.",
    "router": "Serve the edge: text outside, tokens inside.",
    "scheduler": "Serve the scheduler: it plans every step of its workers.",
    "worker": "Serve one device: it runs the scheduler's plans.",
    "generate": "Stream an answer from a running cluster.",
    "chat": "Talk to a model.",
    "demo": "Start a cluster on free ports, stream one answer, show where its time went, and stop.",
    "trace": "Show where the time of a finished request went.",
    "doctor": "Say what this machine can run and what is missing.",
    "tune": "Measure which configuration multiplies each weight fastest on this GPU, and write the table.",
}


def main() -> None:
    """Entry point. Builds only the command that the line names: generating flags costs time. Of gRPC's core only errors
    are told, unless GRPC_VERBOSITY asks for more: it logs every handshake that a peer did not finish."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    named = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    known = named if named in COMMANDS else "help"
    build_app(known)()


if __name__ == "__main__":
    main()
