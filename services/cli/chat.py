"""`sluice chat`: a conversation in the terminal."""

import asyncio
import contextlib
import signal
from typing import Annotated, Any

import typer
from rich.console import Console

from services.cli.connecting import (
    CONNECT_TIMEOUT_S,
    DEFAULT_ADDRESS,
    RETRIES,
    Address,
    CaCerts,
    Certfile,
    Keyfile,
    UseTls,
    api_key,
    tls_of,
)
from services.cli.output import fail, fail_call, fail_field

COMMANDS = "/reset forgets the conversation, /timing shows the last answer's phases, /exit leaves (Ctrl-D too)"


def chat(
    address: Address = DEFAULT_ADDRESS,
    tls: UseTls = False,
    ssl_ca_certs: CaCerts = "",
    ssl_certfile: Certfile = "",
    ssl_keyfile: Keyfile = "",
    model: Annotated[str, typer.Option(help="The served model; needed where there are several.")] = "",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Talk to a model. Ctrl-C ends an answer and keeps the conversation; /reset forgets it."""
    settings = {"model": model, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    secured = tls_of(tls, ssl_ca_certs, ssl_certfile, ssl_keyfile)
    with asyncio.Runner() as runner:
        session = Session(runner, address, secured, system, settings)
        try:
            code = session.run()
        finally:
            runner.run(session.close())
    raise typer.Exit(code)


class Session:
    """One conversation. Blocking where it reads a line, asynchronous where it streams an answer: the runner turns
    Ctrl-C during an answer into a cancellation of that answer alone."""

    def __init__(self, runner: asyncio.Runner, address: str, tls: Any, system: str, settings: dict[str, Any]) -> None:
        self._runner = runner
        self._address = address
        self._tls = tls
        self._settings = settings
        self._first = [("system", system)] if system else []
        self._history: list[tuple[str, str]] = list(self._first)
        self._last: Any = None
        """The end of the last answer, with its timing."""
        self._untimed = "no answer yet"
        """Why there is none."""
        self._client: Any = None
        self._console = Console(highlight=False)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def run(self) -> int:
        """Reads and answers until the end of input. Returns the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing and history
        refusal = self._runner.run(self._open())
        if refusal:
            fail(refusal)
            return 1
        self._console.print(f"[dim]{COMMANDS}[/]")
        while True:
            try:
                line = input("› ").strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
                continue
            if line in ("/exit", "/quit"):
                return 0
            if line:
                self._handle(line)

    async def _open(self) -> str:
        """Connects; returns why the conversation cannot begin, or nothing."""
        from services.cli.client import CallError, Client

        self._client = Client(self._address, api_key=api_key(), tls=self._tls)
        try:
            await self._client.connect(CONNECT_TIMEOUT_S)
            models = await self._client.list_models()
        except CallError as error:
            return str(error)
        wanted = self._settings["model"]
        model = next((m for m in models if not wanted or m.name == wanted), None)
        if model is None:
            served = ", ".join(m.name for m in models) or "none"
            return f"no model {wanted!r} at {self._address}; served: {served}"
        if not model.has_chat_template:
            return f"the model {model.name!r} has no chat template; use `sluice generate`, or give the router one with \
--chat-template FILE"
        self._console.print(f"[bold]{model.name}[/] at {self._address}, up to {model.max_model_len} tokens")
        return ""

    def _handle(self, line: str) -> None:
        if line == "/reset":
            self._history = list(self._first)
            self._console.print("[dim]forgotten[/]")
        elif line == "/timing":
            self._show_timing()
        elif line.startswith("/"):
            self._console.print(f"[dim]{COMMANDS}[/]")
        else:
            self._ask(line)

    def _ask(self, line: str) -> None:
        from services.cli.client import CallError, FieldError

        self._history.append(("user", line))
        parts: list[str] = []
        self._last, self._untimed = None, "the last answer failed: only a whole one has its phases"
        try:
            self._runner.run(self._interruptible(parts))
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._untimed = "you ended the last answer: only a whole one has its phases"
            self._console.print("\n[dim](ended)[/]")
        except (CallError, FieldError) as error:
            print(end="\n" if parts else "", flush=True)
            fail_call(error) if isinstance(error, CallError) else fail_field(error)
        if parts:
            self._history.append(("assistant", "".join(parts)))
        else:
            self._history.pop()  # nothing came: as if it had not been asked

    async def _interruptible(self, parts: list[str]) -> None:
        """An answer that Ctrl-C ends. The loop is told of the signal itself: gRPC's threads may be the ones to get it,
        and Python's own handler would wait until this one wakes up."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await self._answer(parts)
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _answer(self, parts: list[str]) -> None:
        from services.cli.client import Delta, Finished, Message, Request

        messages = tuple(Message(role, content) for role, content in self._history)
        request = Request(messages=messages, include_timing=True, **self._settings)
        async with contextlib.aclosing(self._client.generate(request, retries=RETRIES)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    parts.append(event.text)
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished):
                    self._last = event
                    print(flush=True)

    def _show_timing(self) -> None:
        from services.cli.timing import phase_table

        if self._last is None or not (self._last.timing and self._last.usage):
            self._console.print(f"[dim]{self._untimed}[/]")
        else:
            self._console.print(phase_table(self._last.timing, self._last.usage))
