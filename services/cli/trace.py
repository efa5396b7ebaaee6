"""`sluice trace`: where the time of a finished request went, as a waterfall in the terminal. No collector needed."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.cli.connecting import (
    CONNECT_TIMEOUT_S,
    DEFAULT_ADDRESS,
    Address,
    CaCerts,
    Certfile,
    Keyfile,
    UseTls,
    api_key,
    tls_of,
)
from services.cli.output import fail, fail_call
from shared.telemetry import names

if TYPE_CHECKING:
    from services.cli.client import Tls, Trace, TraceSpan

NS_PER_MS = 1_000_000
COLOURS = {
    names.ADMIT: "yellow",
    names.TOKENIZE: "cyan",
    names.ROUTE: "cyan",
    names.LINK: "blue",
    names.QUEUE: "yellow",
    names.PREFILL: "magenta",
    names.DECODE: "green",
    names.DELIVER: "cyan",
}
QUIET = "bright_black"
WIDEST = 72
NARROWEST = 16

Id = Annotated[str, typer.Argument(metavar="[ID]", help="A request's id, or its trace's; the last request's if none.")]
Last = Annotated[int, typer.Option("--last", min=1, max=256, help="The waterfalls of so many requests, oldest first.")]
List = Annotated[bool, typer.Option("--list", help="One line for each of the last requests instead.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, one request a line.")]
LISTED = 20


def trace(
    request: Id = "",
    last: Last = 1,
    listed: List = False,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
    tls: UseTls = False,
    ssl_ca_certs: CaCerts = "",
    ssl_certfile: Certfile = "",
    ssl_keyfile: Keyfile = "",
) -> None:
    """Show where the time of a finished request went: the router keeps the last 256."""
    secured = tls_of(tls, ssl_ca_certs, ssl_certfile, ssl_keyfile)
    traces = asyncio.run(_fetch(address, secured, request, max(last, LISTED) if listed else last))
    if traces is None:
        raise typer.Exit(1)
    if not traces:
        fail(f"the router knows no request {request!r} among its last" if request else "no request has finished yet")
        raise typer.Exit(1)
    console = Console(highlight=False)
    if as_json:
        for one in reversed(traces):
            print(json.dumps(msgspec.to_builtins(one)))
    elif listed:
        console.print(_list(traces))
    else:
        for one in reversed(traces):
            console.print(waterfall(one, console.width))


async def _fetch(address: str, tls: "Tls | None", request: str, limit: int) -> "tuple[Trace, ...] | None":
    from services.cli.client import CallError, Client

    async with Client(address, api_key=api_key(), tls=tls) as client:
        try:
            await client.connect(CONNECT_TIMEOUT_S)
            return await client.traces(limit, request)
        except CallError as error:
            fail_call(error)
            return None


def waterfall(one: "Trace", width: int) -> Table:
    """A row per span: name, milliseconds, its place in the request's time, and what is worth knowing of it."""
    whole = one.spans[0]
    bars = max(NARROWEST, min(WIDEST, width - 60))
    table = Table(title=_title(one), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("span", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column(f"0 … {_ms(whole.duration_ns)} ms", no_wrap=True, width=bars)
    table.add_column("", overflow="fold")
    for depth, span in _in_order(one.spans):
        name = Text("  " * depth + span.name, style="bold red" if span.error else "bold" if not depth else "")
        bar = _bar(span, max(1, whole.duration_ns), bars)
        table.add_row(name, _ms(span.duration_ns), bar, Text(_note(span), style="red" if span.error else "dim"))
    return table


def _title(one: "Trace") -> Text:
    return Text.assemble((one.request_id, "bold"), (f"   trace {one.trace_id}", "dim"))


def _in_order(spans: "Sequence[TraceSpan]", parent: int = -1, depth: int = 0) -> "Iterator[tuple[int, TraceSpan]]":
    for index, span in enumerate(spans):
        if span.parent == parent:
            yield depth, span
            yield from _in_order(spans, index, depth + 1)


def _bar(span: "TraceSpan", total_ns: int, width: int) -> Text:
    """From where it began to where it ended; at least one cell, for a short phase was still there."""
    first = min(width - 1, span.start_ns * width // total_ns)
    last = min(width, max(first + 1, round((span.start_ns + span.duration_ns) * width / total_ns)))
    colour = COLOURS.get(span.name, QUIET)
    return Text.assemble(" " * first, ("█" * (last - first), "red" if span.error and span.parent >= 0 else colour))


def _note(span: "TraceSpan") -> str:
    if span.error:
        return span.error
    shown = NOTES.get(span.name, ())
    given = [(span.attributes[key], text) for key, text in shown if key in span.attributes]
    notes = [text.format(_short(value)) for value, text in given if value not in ("", "0")]
    return ", ".join(notes) + _waits(span)


def _short(value: str) -> str:
    """A number with no more digits than anybody reads; anything else as it is."""
    try:
        number = float(value) if "." in value else None
    except ValueError:
        return value
    return value if number is None else f"{number:.0f}" if number >= 100 else f"{number:.1f}"


NOTES: dict[str, tuple[tuple[str, str], ...]] = {
    names.GENERATE: (
        (names.INPUT_TOKENS, "{} in"),
        (names.OUTPUT_TOKENS, "{} out"),
        (names.FINISH_REASONS, "{}"),
        (names.BLOCKED_MS, "client blocked {} ms"),
    ),
    names.ROUTE: ((names.CHOSEN, "→ {}"), (names.WARM_TOKENS, "{} tokens warm")),
    names.PREFILL: (
        (names.COMPUTED_TOKENS, "{} tokens computed"),
        (names.PREFILL_CACHED_TOKENS, "{} cached"),
        (names.CHUNKS, "{} chunks"),
        (names.DEVICE_MS, "device {} ms"),
    ),
    names.DECODE: (
        (names.DECODE_TOKENS, "{} tokens"),
        (names.STEPS, "{} steps"),
        (names.BATCH_MEAN, "batch {}"),
        (names.DEVICE_MS, "device {} ms"),
        (names.PREEMPTIONS, "preempted {}×"),
    ),
}


def _waits(span: "TraceSpan") -> str:
    """Why it waited, the longest first."""
    before, after = names.WAIT_MS.split("{}")
    waits = {
        key.removeprefix(before).removesuffix(after): float(value)
        for key, value in span.attributes.items()
        if key.startswith(before) and key.endswith(after)
    }
    longest_first = sorted(waits.items(), key=lambda item: -item[1])
    return "waited for " + ", ".join(f"{reason} {ms:.2f}" for reason, ms in longest_first) if waits else ""


def _list(traces: "Sequence[Trace]") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("request", "end", "ms", "queue", "prefill", "decode", "tokens", "preempted"):
        table.add_column(name, justify="left" if name in ("request", "end") else "right", no_wrap=name != "end")
    for one in traces:
        whole, phases = one.spans[0], (names.QUEUE, names.PREFILL, names.DECODE)
        spent = [sum(span.duration_ns for span in one.spans if span.name == phase) for phase in phases]
        asked = whole.attributes.get(names.INPUT_TOKENS, "–"), whole.attributes.get(names.OUTPUT_TOKENS, "–")
        table.add_row(
            one.request_id,
            Text(whole.attributes.get(names.END, ""), style="red" if whole.error else "green"),
            _ms(whole.duration_ns),
            *map(_ms, spent),
            "{} → {}".format(*asked),
            whole.attributes.get(names.PREEMPTIONS, "0"),
        )
    return table


def _ms(ns: float) -> str:
    return f"{ns / NS_PER_MS:.2f}"
