"""The phase table: where a request's time went."""

from rich.table import Table

from services.cli.client import Timing, Usage

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

PHASES = ("admit", "tokenize", "route", "link", "queue", "prefill", "decode", "deliver")
"""In the order in which a request meets them. They sum to the total: link, queue, prefill and decode are what
`schedule` consists of."""


def phase_table(timing: Timing, usage: Usage) -> Table:
    """One row per phase with its share, then the figures that people compare."""
    table = Table(title="where the time went", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("", no_wrap=True)
    for phase in PHASES:
        ns = getattr(timing, f"{phase}_ns")
        share = ns / timing.total_ns if timing.total_ns else 0.0
        table.add_row(phase, _ms(ns), f"[cyan]{'█' * round(share * 24)}[/] {share:.1%}", style="" if ns else "dim")
    table.add_row("total", _ms(timing.total_ns), _note(timing), style="bold")
    table.add_row()
    for name, value in figures(timing, usage):
        table.add_row(name, value, style="green")
    return table


def figures(timing: Timing, usage: Usage) -> list[tuple[str, str]]:
    """TTFT, TPOT and throughput of one request; TPOT needs a second token."""
    rows = [("TTFT", f"{_ms(timing.time_to_first_token_ns)} ms")]
    if usage.completion_tokens > 1:
        rows.append(("TPOT", f"{_ms(timing.decode_ns / (usage.completion_tokens - 1))} ms"))
    if timing.total_ns:
        rows.append(("tokens/s", f"{usage.completion_tokens * NS_PER_S / timing.total_ns:.1f}"))
    rows.append(("tokens", f"{usage.prompt_tokens} in ({usage.cached_tokens} cached), {usage.completion_tokens} out"))
    return rows


def _ms(ns: float) -> str:
    return f"{ns / NS_PER_MS:.2f}"


def _note(timing: Timing) -> str:
    waits = [f"{reason} {_ms(ns)}" for reason, ns in sorted(timing.queue_reason_ns.items()) if ns]
    notes = [f"waited for {', '.join(waits)}"] if waits else []
    if timing.preemptions:
        notes.append(f"preempted {timing.preemptions}×")
    return "; ".join(notes)
