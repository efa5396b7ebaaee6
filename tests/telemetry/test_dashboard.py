"""The dashboard asks for what is exported, and Prometheus looks where it is."""

import json
import re

import promql_parser
import pytest

from ops.telemetry.dashboard import FILE, text
from shared.config import RouterConfig, SchedulerConfig, WorkerConfig
from shared.telemetry.metrics import EXPORTED, PREFIX, Metric

FROM_PROMETHEUS = {"job", "instance"}
DASHBOARD = json.loads(FILE.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
METRICS = {metric.name: metric for by_service in EXPORTED.values() for metric in by_service}


def series_of(metric: Metric) -> set[str]:
    ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    return {metric.full_name + end for end in ends}


SERIES = {series: metric for metric in METRICS.values() for series in series_of(metric)}


def names_in(query: str) -> set[str]:
    """Of all metrics that a query names, ours or not."""
    return set(re.findall(r"[a-z_]+:[a-z0-9_]+", query))


def test_the_file_is_what_its_program_writes() -> None:
    assert FILE.read_text() == text(), "run: python -m ops.telemetry.dashboard"


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_query_is_valid_and_asks_for_exported_series_by_labels_that_they_have(title: str, query: str) -> None:
    promql_parser.parse(query.replace("$__rate_interval", "1m"))
    used = names_in(query)
    assert used and used <= set(SERIES), f"{title}: {used - set(SERIES)}"
    for name in used:
        metric = SERIES[name]
        grouping = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
        has = {*metric.labels, *FROM_PROMETHEUS} | ({"le"} if name.endswith("_bucket") else set())
        assert grouping <= has, f"{title}: {grouping - has}"
        rated = re.search(rf"(rate|increase)\({name}\[", query) is not None
        assert rated == (metric.kind != "gauge"), f"{title}: counters are rated, gauges are not"


def test_a_query_of_an_unknown_name_would_be_found() -> None:
    assert names_in("rate(sluice:no_such_total[1m])") - set(SERIES)
    assert not names_in("histogram_quantile(0.5, sum by (le) (rate(sluice:step_seconds_bucket[1m])))") - set(SERIES)


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_legend_names_labels_that_the_query_keeps(title: str, query: str) -> None:
    [legend] = {t["legendFormat"] for p in PANELS if p["title"] == title for t in p["targets"] if t["expr"] == query}
    wanted = set(re.findall(r"{{(\w+)}}", legend))
    kept = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(", ")}
    aggregated = "sum" in query
    [metric] = {SERIES[name] for name in names_in(query)} if len(names_in(query)) == 1 else [None]
    assert wanted <= (kept if aggregated else {*metric.labels, *FROM_PROMETHEUS}), title


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_prometheus_looks_at_the_published_ports() -> None:
    said = (FILE.parents[2] / "prometheus.yaml").read_text()
    found = dict(re.findall(r"job_name: (\w+)\n.*port: (\d+)", said))
    ports = {"router": RouterConfig().port, "scheduler": SchedulerConfig().metrics_port}
    assert {job: int(port) for job, port in found.items()} == {**ports, "worker": WorkerConfig().metrics_port}


def test_the_prefix_is_ours_alone() -> None:
    assert all(name.startswith(PREFIX) for _, query in QUERIES for name in names_in(query))
