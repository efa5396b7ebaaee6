"""/metrics of a real cluster: every service says what happened, and it is what the traces say."""

import asyncio
import math
import socket
import subprocess
from collections import Counter

import pytest

from services.cli.client import Client, Request, Trace
from services.router.metrics import AFTER_ADMISSION
from shared.outcome import REFUSALS
from shared.telemetry.metrics import EXPORTED, PREFIX
from tests.builders.answers import ask_all, collect
from tests.builders.cluster import SLUICE, RunningCluster, wait_for
from tests.builders.scrape import Scrape, fetch, scrape
from tests.cluster.test_traces import ask_some, mixed
from tests.models.twins import make_twin
from tests.telemetry.test_dashboard import QUERIES, names_in

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 100
KEPT = 256


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict:
    model = make_twin("llama", tmp_path_factory.mktemp("twin"))
    return {"model": str(model), "dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 512}


def read(cluster: RunningCluster, name: str) -> Scrape:
    return scrape(cluster.http(name))


def attribute(trace: Trace, name: str) -> float:
    return float(trace.spans[0].attributes.get(name, 0))


def is_rejection(trace: Trace) -> bool:
    end = trace.spans[0].attributes["sluice.request.end"]
    return (
        end in REFUSALS and end not in AFTER_ADMISSION and not attribute(trace, "gen_ai.response.time_to_first_chunk")
    )


def ask_mixed(cluster: RunningCluster) -> list[Trace]:
    """Requests of all kinds, and the traces of all of them."""

    async def run() -> list[Trace]:
        async with Client(cluster.address) as client:
            await ask_some(client, mixed(NUM_REQUESTS))
            await asyncio.sleep(0.3)  # those that left are accounted for a moment later
            return list(await client.traces(KEPT))

    return asyncio.run(run())


def assert_sums(said: Scrape, name: str, values: list[float]) -> None:
    """A histogram of these values: their number, and their sum as far as a trace's text tells it."""
    assert said(f"{name}_count") == len(values), name
    assert math.isclose(said(f"{name}_sum"), sum(values), rel_tol=1e-3, abs_tol=1e-3), name


def test_the_metrics_of_mixed_requests_are_what_their_traces_say(own_cluster, twin: dict) -> None:
    with own_cluster(**twin, num_gpu_blocks_override=24, max_num_queued_reqs=12) as running:
        traces = ask_mixed(running)
        said = {name: read(running, name) for name in ("router", "scheduler", "worker-0")}
        running.assert_idle()
    for name, its in said.items():
        exported = EXPORTED[name.partition("-")[0]]
        assert its.kinds == {metric.name: metric.kind for metric in exported}
    assert_dashboard_finds_all(said)
    assert len(traces) == NUM_REQUESTS
    assert_edge_agrees(said["router"], traces)
    assert_scheduler_agrees(said["scheduler"], traces)
    flops, read_bytes = said["worker-0"]("estimated_flops_total"), said["worker-0"]("estimated_read_bytes_total")
    assert flops > 0 and read_bytes > 0
    assert set(said["worker-0"].labels("cache_config_info", "num_gpu_blocks")) == {"24"}


def assert_dashboard_finds_all(said: dict[str, Scrape]) -> None:
    """Every series that the dashboard asks for was scraped from somebody."""
    series = {PREFIX + name for its in said.values() for name, _ in its.values}
    asked = {name for _, query in QUERIES for name in names_in(query)}
    assert asked and asked <= series, asked - series


def assert_edge_agrees(router: Scrape, traces: list[Trace]) -> None:
    begun = [trace for trace in traces if not is_rejection(trace)]
    rejected = Counter(trace.spans[0].attributes["sluice.request.end"] for trace in traces if is_rejection(trace))
    reasons = router.labels("admission_rejections_total", "reason")
    assert {reason: n for reason, n in reasons.items() if n} == rejected
    assert {"queue_full", "prompt_too_long"} <= set(rejected)
    firsts = [attribute(trace, "gen_ai.response.time_to_first_chunk") for trace in traces]
    assert_sums(router, "time_to_first_token_seconds", [first for first in firsts if first])
    assert_sums(router, "e2e_request_latency_seconds", [attribute(trace, "gen_ai.latency.e2e") for trace in begun])
    answered = [trace for trace in begun if "gen_ai.usage.input_tokens" in trace.spans[0].attributes]
    for name, metric in (
        ("gen_ai.usage.output_tokens", "generation_tokens_total"),
        ("gen_ai.usage.cache_read.input_tokens", "prompt_tokens_cached_total"),
    ):
        assert router(metric) == sum(attribute(trace, name) for trace in answered) > 0, metric
    assert_sums(router, "request_prompt_tokens", [attribute(trace, "gen_ai.usage.input_tokens") for trace in answered])
    for phase in ("prefill", "decode"):
        spent = [attribute(trace, f"gen_ai.latency.time_in_model_{phase}") for trace in answered]
        assert_sums(router, f"request_{phase}_time_seconds", [value for value in spent if value])
    ended = router.labels("request_success_total", "finished_reason")
    assert ended["length"] > 0 and ended["abort"] > 0
    assert sum(ended.values()) == sum(attribute(trace, "sluice.request.n") or 1 for trace in begun)


def assert_scheduler_agrees(scheduler: Scrape, traces: list[Trace]) -> None:
    preempted = scheduler.labels("num_preemptions_total", "reason")
    assert preempted["blocks"] == sum(attribute(trace, "sluice.preemptions") for trace in traces) > 0
    assert sum(scheduler.labels("aborts_total", "phase").values()) > 0
    assert scheduler("abort_to_free_seconds_count") == sum(scheduler.labels("aborts_total", "phase").values())
    assert 0 < scheduler("prefix_cache_hits_total") < scheduler("prefix_cache_queries_total")
    assert scheduler("step_seconds_count") == scheduler("iteration_tokens_total_count") > 0
    assert scheduler("step_gap_seconds_count") == scheduler("step_seconds_count")
    assert scheduler("num_requests_running") == scheduler("num_requests_waiting") == 0
    assert scheduler.labels("kv_blocks", "state")["referenced"] == scheduler("kv_cache_usage_perc") == 0
    assert sum(scheduler.labels("kv_blocks", "state").values()) == 24
    assert scheduler("kv_invariant_violations_total") == 0


def test_a_killed_workers_requests_are_counted_where_they_go(own_cluster, twin: dict) -> None:
    requests = [Request(token_ids=(5, 6, 7, i), max_tokens=200, ignore_eos=True) for i in range(2, 10)]
    with own_cluster(**twin, workers=2) as running:
        assert len(read(running, "scheduler").labels("heartbeat_age_seconds", "worker")) == 2
        assert running.http("worker-0") != running.http("worker-1")

        async def kill_in_mid_stream() -> list[str]:
            async with Client(running.address) as client:
                begun = asyncio.Event()
                asking = [collect(client, request, on_delta=lambda _: begun.set()) for request in requests]
                tasks = [asyncio.create_task(each) for each in asking]
                await begun.wait()
                await asyncio.sleep(0.1)
                running.kill_service("worker-0")
                return [answer.status for answer in await asyncio.gather(*tasks)]

        assert set(asyncio.run(kill_in_mid_stream())) == {"OK"}
        said = read(running, "scheduler")
        moved = said.labels("migrations_total", "result")
        assert moved["moved"] > 0 and moved["failed"] == 0
        assert 0 < said.labels("num_preemptions_total", "reason")["worker_lost"] <= moved["moved"]
        wait_for(
            lambda: len(read(running, "scheduler").labels("heartbeat_age_seconds", "worker")) == 2, 30, "two workers"
        )
        assert read(running, "worker-0")("estimated_flops_total") < read(running, "worker-1")("estimated_flops_total")


def test_metrics_are_read_while_requests_run(cluster, twin: dict) -> None:
    running = cluster(**twin)
    requests = [Request(prompt="def f(x):", max_tokens=100, ignore_eos=True) for _ in range(8)]
    assert fetch(running.http("router"), "/health") == (200, "ok\n")

    async def scrape_meanwhile() -> list[float]:
        asking = asyncio.create_task(asyncio.to_thread(ask_all, running.address, requests))
        running_samples = []
        while not asking.done():
            said = await asyncio.to_thread(read, running, "scheduler")
            running_samples.append(said("num_requests_running"))
            blocks = said.labels("kv_blocks", "state")
            assert blocks["referenced"] / sum(blocks.values()) == pytest.approx(said("kv_cache_usage_perc"), abs=0.05)
        assert {answer.status for answer in await asking} == {"OK"}
        return running_samples

    assert max(asyncio.run(scrape_meanwhile())) > 1


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_taken_http_port_is_said_before_anything_starts(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        command = [*SLUICE, "up", "--grpc-port=0", f"{flag}={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
    assert f"choose another with {flag}" in done.stderr


@pytest.mark.parametrize(
    ("service", "flag"), [("router", "--port"), ("scheduler", "--metrics-port"), ("worker", "--metrics-port")]
)
def test_a_service_by_itself_names_the_flag_of_a_taken_http_port(service: str, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        grpc_flag = "--grpc-port=0" if service == "router" else "--port=0"
        command = [*SLUICE, service, grpc_flag, f"{flag}={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"127.0.0.1:{port}" in error and error.endswith(f"choose another with {flag}")
    assert "Traceback" not in done.stderr
