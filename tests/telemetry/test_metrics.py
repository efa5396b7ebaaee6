"""Names, kinds and buckets are a contract (names.md); what is counted is what is said."""

import asyncio
import socket
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shared.net.http import MAX_CALLS, HttpDoor
from shared.net.server import BindError
from shared.telemetry import metrics
from shared.telemetry.exposition import Exposition, Histogram, Reading
from shared.telemetry.lag import INTERVAL_S, LoopLag
from shared.telemetry.metrics import EXPORTED, Metric
from tests.builders.scrape import Scrape, fetch, parse

# As names.md lists them.
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "step_seconds",
    "step_gap_seconds",
    "loop_lag_seconds",
    "abort_to_free_seconds",
)
GAUGES = {
    "num_requests_running": (),
    "num_requests_waiting": (),
    "num_requests_waiting_by_reason": ("reason",),
    "kv_cache_usage_perc": (),
    "kv_blocks": ("state",),
    "heartbeat_age_seconds": ("worker",),
}
COUNTERS = {
    "prompt_tokens_total": (),
    "generation_tokens_total": (),
    "prompt_tokens_cached_total": (),
    "prefix_cache_queries_total": (),
    "prefix_cache_hits_total": (),
    "num_preemptions_total": ("reason",),
    "request_success_total": ("finished_reason",),
    "admission_rejections_total": ("reason",),
    "aborts_total": ("phase",),
    "migrations_total": ("result",),
    "kv_invariant_violations_total": (),
    "spans_dropped_total": (),
    "estimated_flops_total": (),
    "estimated_read_bytes_total": (),
    "late_compilations_total": (),
    "product_tables_total": ("verdict",),
}
NOT_YET = {"spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"}
"""They wait for speculation."""
# fmt: off
TTFT_BUCKETS = [.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160]
ITL_BUCKETS = [.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10]
# fmt: on


def told(*pairs: tuple[Metric, Reading]) -> Scrape:
    registry = CollectorRegistry(auto_describe=False)
    readings = {metric.name: lambda reading=reading: reading for metric, reading in pairs}
    registry.register(Exposition([metric for metric, _ in pairs], readings))
    return parse(generate_latest(registry).decode())


def test_every_published_name_is_exported_with_its_kind_and_labels_and_no_other() -> None:
    declared = {metric.name: metric for by_service in EXPORTED.values() for metric in by_service}
    kinds = dict.fromkeys(HISTOGRAMS, "histogram") | dict.fromkeys([*GAUGES, "cache_config_info"], "gauge")
    kinds |= dict.fromkeys(COUNTERS, "counter")
    assert {name: metric.kind for name, metric in declared.items()} == kinds
    assert not NOT_YET & set(declared)
    for name, labels in (GAUGES | COUNTERS).items():
        assert declared[name].labels == labels


def test_no_metric_is_exported_by_two_services_but_what_each_has_of_its_own() -> None:
    names = [metric.name for by_service in EXPORTED.values() for metric in by_service]
    assert {name for name in names if names.count(name) > 1} == {"loop_lag_seconds", "spans_dropped_total"}


def test_the_published_buckets_are_kept() -> None:
    assert list(metrics.TIME_TO_FIRST_TOKEN.buckets) == TTFT_BUCKETS
    assert list(metrics.INTER_TOKEN_LATENCY.buckets) == ITL_BUCKETS
    for by_service in EXPORTED.values():
        for metric in by_service:
            assert list(metric.buckets) == sorted(set(metric.buckets))
            assert bool(metric.buckets) == (metric.kind == "histogram")


def test_a_histogram_counts_a_value_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram(metrics.TIME_TO_FIRST_TOKEN)
    for value in (0.0005, 0.001, 0.0011, 160, 161):
        histogram.observe(value)
    said = told((metrics.TIME_TO_FIRST_TOKEN, histogram))
    buckets = said.buckets("time_to_first_token_seconds")
    assert (buckets[0.001], buckets[0.005], buckets[80], buckets[160], buckets[float("inf")]) == (2, 3, 3, 4, 5)
    assert said("time_to_first_token_seconds_count") == 5
    assert said("time_to_first_token_seconds_sum") == pytest.approx(321.0026)


def test_counters_and_gauges_are_said_with_their_labels() -> None:
    said = told(
        (metrics.PROMPT_TOKENS, 7),
        (metrics.KV_BLOCKS, {"free": 3, "cached": 0}),
        (metrics.CACHE_CONFIG_INFO, {tuple("12345678"): 1}),
    )
    assert said("prompt_tokens_total") == 7
    assert said.labels("kv_blocks", "state") == {"free": 3, "cached": 0}
    assert said("cache_config_info", **dict(zip(metrics.CACHE_CONFIG_INFO.labels, "12345678", strict=True))) == 1
    assert said.kinds == {"prompt_tokens_total": "counter", "kv_blocks": "gauge", "cache_config_info": "gauge"}


def test_a_metric_without_a_reading_is_an_error_and_so_is_a_reading_without_a_metric() -> None:
    with pytest.raises(ValueError, match="kv_blocks"):
        Exposition([metrics.KV_BLOCKS], {})
    with pytest.raises(ValueError, match="other"):
        Exposition([], {"other": lambda: 1})


def test_a_loop_that_is_held_up_is_late() -> None:
    async def run() -> LoopLag:
        lag = LoopLag()
        lag.start()
        await asyncio.sleep(INTERVAL_S / 2)
        time.sleep(INTERVAL_S)  # noqa: ASYNC251 - what it is to see
        await asyncio.sleep(INTERVAL_S / 2)
        lag.stop()
        return lag

    histogram = asyncio.run(run()).histogram
    assert histogram.total >= INTERVAL_S / 4


def door(port: int = 0) -> HttpDoor:
    exposition = Exposition([metrics.PROMPT_TOKENS], {"prompt_tokens_total": lambda: 7})
    return HttpDoor("127.0.0.1", port, exposition, flag="--metrics-port")


@pytest.mark.parametrize(
    ("path", "status"), [("/metrics", 200), ("/health", 404), ("/", 404), ("/metrics/../etc/passwd", 404)]
)
def test_the_http_door_answers_what_it_has(path: str, status: int) -> None:
    async def run() -> tuple[int, str]:
        opened = door()
        try:
            return await asyncio.to_thread(fetch, opened.address, path)
        finally:
            opened.close()

    got, text = asyncio.run(run())
    assert got == status
    assert ("sluice:prompt_tokens_total 7.0" in text) == (path == "/metrics")


def test_a_taken_http_port_is_a_sentence_that_names_the_flag() -> None:
    async def run() -> None:
        opened = door()
        try:
            with pytest.raises(BindError, match=r"127\.0\.0\.1:\d+.*taken.*--metrics-port"):
                door(int(opened.address.rpartition(":")[2]))
        finally:
            opened.close()
        again = door(int(opened.address.rpartition(":")[2]))  # it is free at once
        again.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "sent", [b"", b"\x00\xff\x00\r\n\r\n", b"GET", b"POST /metrics HTTP/1.1\r\n\r\n", b"A" * 70_000]
)
def test_callers_who_make_no_sense_hold_up_neither_the_loop_nor_the_others(sent: bytes) -> None:
    async def run() -> None:
        opened = door()
        host, _, port = opened.address.rpartition(":")
        connect = lambda: socket.create_connection((host, int(port)), timeout=3)  # noqa: E731
        callers = [await asyncio.to_thread(connect) for _ in range(MAX_CALLS // 2)]
        try:
            for caller in callers:
                caller.sendall(sent)
            status, _ = await asyncio.wait_for(asyncio.to_thread(fetch, opened.address), 3)
            assert status == 200
        finally:
            for caller in callers:
                caller.close()
            opened.close()

    asyncio.run(run())


ACCEPTED = {
    "prometheus 2": "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "prometheus 3": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=0.0.4;q=0.3",
    "curl": "*/*",
}


@pytest.mark.parametrize("accept", ACCEPTED.values(), ids=ACCEPTED.keys())
@pytest.mark.parametrize("service", list(EXPORTED))
def test_whoever_asks_gets_the_names_that_the_dashboard_queries(service: str, accept: str) -> None:
    def reading(metric: Metric) -> Reading:
        if metric.kind == "histogram":
            return Histogram(metric)
        return {tuple("x" for _ in metric.labels): 1} if metric.labels else 1

    readings = {metric.name: lambda metric=metric: reading(metric) for metric in EXPORTED[service]}

    async def run() -> tuple[str, str]:
        opened = HttpDoor("127.0.0.1", 0, Exposition(EXPORTED[service], readings), flag="--port")

        def ask() -> tuple[str, str]:
            request = urllib.request.Request(f"http://{opened.address}/metrics", headers={"Accept": accept})
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.headers["Content-Type"], response.read().decode()

        try:
            return await asyncio.to_thread(ask)
        finally:
            opened.close()

    kind, text = asyncio.run(run())
    assert kind.startswith("text/plain; version=0.0.4")
    families = {family.name + "_total" * (family.type == "counter") for family in text_string_to_metric_families(text)}
    assert families == {metric.full_name for metric in EXPORTED[service]}
    assert "_created" not in text


def test_processes_that_share_the_work_are_one_in_the_metrics() -> None:
    exported = (metrics.PROMPT_TOKENS, metrics.REQUEST_SUCCESS, metrics.TIME_TO_FIRST_TOKEN)

    def process(tokens: int, ends: dict[str, int], seconds: list[float]) -> Exposition:
        histogram = Histogram(metrics.TIME_TO_FIRST_TOKEN)
        for value in seconds:
            histogram.observe(value)
        readings = {
            "prompt_tokens_total": lambda: tokens,
            "request_success_total": lambda: ends,
            "time_to_first_token_seconds": lambda: histogram,
        }
        return Exposition(exported, readings)

    one, other = process(5, {"stop": 1, "length": 2}, [0.003, 2.0]), process(7, {"stop": 10, "abort": 1}, [0.003])
    merged = parse(generate_latest(one.merged_with([other.snapshot()])).decode())
    assert merged("prompt_tokens_total") == 12
    assert merged.labels("request_success_total", "finished_reason") == {"stop": 11, "length": 2, "abort": 1}
    assert merged("time_to_first_token_seconds_count") == 3
    assert merged("time_to_first_token_seconds_sum") == pytest.approx(2.006)
    alone = parse(generate_latest(one.merged_with([])).decode())
    assert alone("prompt_tokens_total") == 5
