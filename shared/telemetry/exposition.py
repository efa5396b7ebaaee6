"""Counting while requests run, and saying what was counted when Prometheus asks.

Whoever counts adds to plain numbers: a lock and a label lookup per observation, as prometheus_client's own metrics have
them, would be paid on every token. `Exposition` reads the numbers when they are scraped, from another thread; each of
them has one writer, and under the interpreter lock a reader sees it before or after a change, never within.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

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
