"""Counting while requests run, and saying what was counted when Prometheus asks.

Whoever counts adds to plain numbers: a lock and a label lookup per observation, as prometheus_client's own metrics have
them, would be paid on every token. `Exposition` reads the numbers when they are scraped, from another thread; each of
them has one writer, and under the interpreter lock a reader sees it before or after a change, never within.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from shared.telemetry.metrics import Metric


class Histogram:
    """Observations by bucket. One owner."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, metric: Metric) -> None:
        self._bounds = metric.buckets
        self.counts = [0] * (len(metric.buckets) + 1)
        """By bucket, not cumulated; the last one is of what lies beyond all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Takes about 0.2 µs."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


Reading = float | Mapping[str, float] | Mapping[tuple[str, ...], float] | Histogram
"""A number; numbers by label value (a tuple where there are several labels); or a histogram."""


class Exposition(Collector):
    """What one process exports, each with how to read it."""

    def __init__(self, exported: Iterable[Metric], readings: Mapping[str, Callable[[], Reading]]) -> None:
        """`readings` has one function for each exported name. Raises ValueError where one lacks or is too many."""
        self._metrics = tuple(exported)
        self._readings = readings
        differing = {metric.name for metric in self._metrics} ^ set(readings)
        if differing:
            raise ValueError(f"exported and read differ in {', '.join(sorted(differing))}")

    def collect(self) -> Iterable[Family]:
        for metric in self._metrics:
            yield _family(metric, self._readings[metric.name]())

    def snapshot(self) -> bytes:
        """What is read now, for `merged_with` in another process."""
        return msgspec.json.encode({metric.name: _plain(self._readings[metric.name]()) for metric in self._metrics})

    def merged_with(self, snapshots: Iterable[bytes]) -> "Exposition":
        """Of several processes as if they were one: every number is the sum of theirs. For what adds up, as counters
        and histograms do."""
        read = [msgspec.json.decode(snapshot) for snapshot in (self.snapshot(), *snapshots)]
        sums = {metric.name: _sum(metric, [numbers[metric.name] for numbers in read]) for metric in self._metrics}
        return Exposition(self._metrics, {name: _constant(reading) for name, reading in sums.items()})


def _constant(reading: Reading) -> Callable[[], Reading]:
    return lambda: reading


def _plain(reading: Reading) -> Any:
    """As JSON: a number, pairs of labels and number, or a histogram's parts."""
    if isinstance(reading, Histogram):
        return {"counts": list(reading.counts), "total": reading.total}
    if isinstance(reading, Mapping):
        return [[[key] if isinstance(key, str) else list(key), value] for key, value in reading.items()]
    return reading


def _sum(metric: Metric, plain: list[Any]) -> Reading:
    if metric.kind == "histogram":
        whole = Histogram(metric)
        whole.counts = [sum(counts) for counts in zip(*(one["counts"] for one in plain), strict=True)]
        whole.total = sum(one["total"] for one in plain)
        return whole
    if metric.labels:
        by_labels: dict[tuple[str, ...], float] = {}
        for labels, value in (pair for one in plain for pair in one):
            by_labels[tuple(labels)] = by_labels.get(tuple(labels), 0) + value
        return by_labels
    return float(sum(plain))


def _family(metric: Metric, reading: Reading) -> Family:
    if isinstance(reading, Histogram):
        return _histogram_family(metric, reading)
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind == "counter":
        family = CounterMetricFamily(metric.full_name, metric.help, labels=metric.labels)
    else:
        family = GaugeMetricFamily(metric.full_name, metric.help, labels=metric.labels)
    by_label: Mapping[Any, float] = reading if isinstance(reading, Mapping) else {(): reading}
    for labels, value in by_label.items():
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    return family


def _histogram_family(metric: Metric, reading: Histogram) -> Family:
    total, counts = reading.total, list(reading.counts)
    bounds = [*map(floatToGoString, metric.buckets), "+Inf"]
    family = HistogramMetricFamily(metric.full_name, metric.help)
    family.add_metric((), list(zip(bounds, accumulate(counts), strict=True)), total)
    return family
