"""Writes the Grafana dashboard: `python -m ops.telemetry.dashboard`. Its queries are made of the names that
shared/telemetry/metrics.py declares; a test holds the file to this and to what a cluster exports."""

import json
from pathlib import Path
from typing import Any

import msgspec

from shared.telemetry import metrics
from shared.telemetry.metrics import Metric

FILE = Path(__file__).with_name("grafana") / "dashboards" / "sluice.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
QUANTILES = (0.5, 0.9, 0.99)
PANELS_A_ROW, WIDTH, HEIGHT = 3, 8, 8


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One graph: its queries by legend. `unit` is Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str = ""
    stacked: bool = False
    most: float | None = None


def rate(metric: Metric, *by: str, of: str = "") -> str:
    """Per second; `of` is _sum, _count or _bucket of a histogram."""
    grouping = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouping} (rate({metric.full_name}{of}[$__rate_interval]))"


def quantiles(metric: Metric, *by: str) -> dict[str, str]:
    legend = "".join(f"{{{{{label}}}}} " for label in by)
    return {
        f"{legend}p{100 * q:g}": f"histogram_quantile({q}, {rate(metric, 'le', *by, of='_bucket')})" for q in QUANTILES
    }


def mean(metric: Metric) -> str:
    return f"{rate(metric, of='_sum')} / {rate(metric, of='_count')}"


def latency(title: str, metric: Metric) -> Panel:
    return Panel(title=title, unit="s", queries=quantiles(metric), about=metric.help)


def by_label(title: str, metric: Metric, unit: str = "ops") -> Panel:
    [label] = metric.labels
    return Panel(
        title=title, unit=unit, queries={f"{{{{{label}}}}}": rate(metric, label)}, about=metric.help, stacked=True
    )


def gauge(title: str, metric: Metric, unit: str = "short") -> Panel:
    [label] = metric.labels
    query = f"sum by ({label}) ({metric.full_name})"
    return Panel(title=title, unit=unit, queries={f"{{{{{label}}}}}": query}, about=metric.help, stacked=True)


HIT_RATE = f"{rate(metrics.PREFIX_CACHE_HITS)} / {rate(metrics.PREFIX_CACHE_QUERIES)}"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        by_label("Ends", metrics.REQUEST_SUCCESS, "reqps"),
        Panel(
            title="Tokens per second",
            unit="short",
            queries={
                "prompt": rate(metrics.PROMPT_TOKENS),
                "of it cached": rate(metrics.PROMPT_TOKENS_CACHED),
                "generated": rate(metrics.GENERATION_TOKENS),
            },
        ),
        by_label("Rejections at admission", metrics.ADMISSION_REJECTIONS, "reqps"),
    ),
    "Latency": (
        latency("Time to first token", metrics.TIME_TO_FIRST_TOKEN),
        latency("Between tokens", metrics.INTER_TOKEN_LATENCY),
        latency("End to end", metrics.E2E_LATENCY),
        latency("Time per output token", metrics.TIME_PER_OUTPUT_TOKEN),
        latency("In prefill", metrics.PREFILL_TIME),
        latency("In decode", metrics.DECODE_TIME),
    ),
    "Queue": (
        latency("Time in the queue", metrics.QUEUE_TIME),
        gauge("Waiting, by reason", metrics.NUM_WAITING_BY_REASON),
        Panel(
            title="Running and waiting",
            unit="short",
            queries={
                "running": f"sum({metrics.NUM_RUNNING.full_name})",
                "waiting": f"sum({metrics.NUM_WAITING.full_name})",
            },
        ),
        by_label("Preemptions", metrics.NUM_PREEMPTIONS),
        by_label("Aborts, by phase", metrics.ABORTS),
        latency("From an abort to free", metrics.ABORT_TO_FREE),
    ),
    "KV cache": (
        gauge("Blocks, by state", metrics.KV_BLOCKS),
        Panel(
            title="Usage",
            unit="percentunit",
            queries={"{{instance}}": metrics.KV_CACHE_USAGE.full_name},
            about=metrics.KV_CACHE_USAGE.help,
            most=1,
        ),
        Panel(
            title="Prefix hit rate",
            unit="percentunit",
            queries={"hits": HIT_RATE},
            about="Of the tokens that were looked up when a sample was first admitted.",
            most=1,
        ),
    ),
    "Steps": (
        latency("Step time", metrics.STEP_TIME),
        latency("Gap between steps", metrics.STEP_GAP),
        Panel(title="Tokens in a step, mean", unit="short", queries={"tokens": mean(metrics.ITERATION_TOKENS)}),
        Panel(
            title="Operations per second, estimated",
            unit="flops",
            queries={"{{instance}}": rate(metrics.ESTIMATED_FLOPS, "instance")},
            about=metrics.ESTIMATED_FLOPS.help,
        ),
        Panel(
            title="Bytes read per second, estimated",
            unit="Bps",
            queries={"{{instance}}": rate(metrics.ESTIMATED_READ_BYTES, "instance")},
            about=metrics.ESTIMATED_READ_BYTES.help,
        ),
        Panel(
            title="Loop lag",
            unit="s",
            queries={"{{job}} p99": f"histogram_quantile(0.99, {rate(metrics.LOOP_LAG, 'le', 'job', of='_bucket')})"},
            about=metrics.LOOP_LAG.help,
        ),
    ),
    "Failures": (
        Panel(
            title="Workers: seconds since heard of",
            unit="s",
            queries={"{{worker}}": metrics.HEARTBEAT_AGE.full_name},
            about=metrics.HEARTBEAT_AGE.help,
        ),
        by_label("Samples of lost workers", metrics.MIGRATIONS),
        Panel(
            title="Spans dropped, contradictions in the books",
            unit="short",
            queries={
                "spans in 5 min": f"sum (increase({metrics.SPANS_DROPPED.full_name}[5m]))",
                "contradictions in 1 h": f"sum (increase({metrics.KV_INVARIANT_VIOLATIONS.full_name}[1h]))",
            },
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(title, len(panels) + 1, top))
        top += 1
        for i, panel in enumerate(row):
            column, line = i % PANELS_A_ROW, i // PANELS_A_ROW
            panels.append(_graph(panel, len(panels) + 1, column * WIDTH, top + line * HEIGHT))
        top += -(-len(row) // PANELS_A_ROW) * HEIGHT
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source", "hide": 0}
    return {
        "uid": "sluice",
        "title": "Sluice",
        "tags": ["sluice"],
        "schemaVersion": 39,
        "timezone": "browser",
        "time": {"from": "now-15m", "to": "now"},
        "refresh": "5s",
        "templating": {"list": [source]},
        "panels": panels,
    }


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": WIDTH * PANELS_A_ROW, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _graph(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    lines = {"lineWidth": 1, "fillOpacity": 20 if panel.stacked else 5, "showPoints": "never"}
    if panel.stacked:
        lines["stacking"] = {"mode": "normal", "group": "A"}
    defaults = {"unit": panel.unit, "min": 0, "custom": lines} | ({} if panel.most is None else {"max": panel.most})
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": left, "y": top, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text())
