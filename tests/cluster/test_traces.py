"""Traces of real requests add up, whatever becomes of them; and a collector gets what the router shows."""

import asyncio
import contextlib
import random
import statistics
import subprocess

import pytest

from services.cli.client import CallError, Client, Request, Trace, TraceSpan
from tests.builders.answers import collect
from tests.builders.cluster import SLUICE, RunningCluster
from tests.builders.collector import Collector
from tests.counts import count
from tests.models.twins import make_twin

pytestmark = pytest.mark.cluster

AT_ONCE = 24
KEPT = 256
LINK_NS = 20_000_000
"""What the median request may spend between router and scheduler, on a machine that is busy."""


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict:
    model = make_twin("llama", tmp_path_factory.mktemp("twin"))
    return {"model": str(model), "dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 512}


def sluice(*arguments: str, address: str) -> str:
    command = [*SLUICE, *arguments, f"--address={address}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def slack_ns(span: TraceSpan) -> float:
    return max(0.01 * span.duration_ns, 500_000)


def assert_adds_up(trace: Trace) -> None:
    for index, span in enumerate(trace.spans):
        inner = [child for child in trace.spans if child.parent == index]
        if not inner:
            continue
        assert abs(sum(child.duration_ns for child in inner) - span.duration_ns) <= slack_ns(span), trace
        ends = [span.start_ns, *(child.start_ns + child.duration_ns for child in inner)]
        assert all(child.start_ns >= end for child, end in zip(inner, ends, strict=False)), "children are disjoint"


def mixed(number: int) -> list[Request]:
    """Requests that share prefixes, crowd the pool, sample twice, ask for too much, or are too long."""
    rng = random.Random(7)
    shared = tuple(rng.randrange(2, 384) for _ in range(48))
    requests = []
    for i in range(number):
        own = tuple(rng.randrange(2, 384) for _ in range(rng.randrange(4, 60)))
        fields = {"token_ids": (*shared, *own) if i % 3 == 0 else own, "max_tokens": rng.randrange(1, 48)}
        if i % 11 == 0:
            fields["n"] = 2
        if i % 17 == 0:
            fields = {"prompt": "word " * 600}
        requests.append(Request(request_id=f"mixed-{i}", ignore_eos=True, **fields))
    return requests


async def ask_some(client: Client, requests: list[Request]) -> None:
    """All of them, a few at once; every seventh client leaves after its first tokens."""

    async def one(i: int, request: Request) -> None:
        if i % 7 == 3:
            with contextlib.suppress(CallError):
                async with contextlib.aclosing(client.generate(request)) as events:
                    async for _ in events:
                        break
        else:
            await collect(client, request)

    for at in range(0, len(requests), AT_ONCE):
        await asyncio.gather(*(one(i, request) for i, request in enumerate(requests[at : at + AT_ONCE])))


def test_the_phases_of_mixed_requests_sum_to_their_time(cluster, twin: dict) -> None:
    running = cluster(**twin, num_gpu_blocks_override=24, max_num_queued_reqs=AT_ONCE // 2)
    seen: dict[str, Trace] = {}

    async def run() -> None:
        requests = mixed(count("traced_requests"))
        async with Client(running.address) as client:
            for at in range(0, len(requests), KEPT // 2):
                await ask_some(client, requests[at : at + KEPT // 2])
                await asyncio.sleep(0.2)  # those that left are accounted for a moment later
                seen.update({trace.request_id: trace for trace in await client.traces(KEPT)})

    asyncio.run(run())
    assert len([name for name in seen if name.startswith("mixed-")]) == count("traced_requests")
    for trace in seen.values():
        assert_adds_up(trace)
    links = [span.duration_ns for trace in seen.values() for span in trace.spans if span.name == "link"]
    assert 0 < statistics.median(links) < LINK_NS, "what nobody accounts for is no hiding place"
    wholes = [trace.spans[0].attributes for trace in seen.values()]
    ends = {whole["sluice.request.end"] for whole in wholes}
    assert {"answered", "left", "queue_full", "prompt_too_long"} <= ends
    assert any(int(whole.get("sluice.preemptions", 0)) for whole in wholes)
    assert any(int(whole.get("gen_ai.usage.cache_read.input_tokens", 0)) for whole in wholes)
    waits = [span.attributes for trace in seen.values() for span in trace.spans if span.name == "queue"]
    assert {wait["sluice.queue.reason"] for wait in waits if wait} >= {"blocks"}


def test_a_request_whose_worker_died_says_that_it_waited_for_another(own_cluster, twin: dict) -> None:
    requests = [Request(token_ids=(5, 6, 7, i), max_tokens=200, ignore_eos=True) for i in range(2, 10)]

    async def run(running: RunningCluster) -> list[Trace]:
        async with running.client() as client:
            begun = asyncio.Event()
            tasks = [asyncio.create_task(collect(client, each, on_delta=lambda _: begun.set())) for each in requests]
            await begun.wait()
            await asyncio.sleep(0.1)
            running.kill_service("worker-0")
            await asyncio.gather(*tasks)
            return list(await client.traces(len(requests)))

    with own_cluster(**twin, workers=2) as running:
        traces = asyncio.run(run(running))
    assert len(traces) == len(requests)
    for trace in traces:
        assert_adds_up(trace)
    again = [trace for trace in traces if any("sluice.queue.worker_lost_ms" in s.attributes for s in trace.spans)]
    assert 0 < len(again) < len(traces), "those of the other worker never waited"
    for trace in again:
        prefills = [span.attributes for span in trace.spans if span.name == "prefill"]
        assert int(prefills[-1]["sluice.prefill.computed_tokens"]) > 4, "what had been generated is computed again"


def test_sluice_trace_shows_the_last_request(cluster, twin: dict) -> None:
    running = cluster(**twin)
    sluice("generate", "hello", "--max-tokens=4", "--request-id=seen", address=running.address)
    shown = sluice("trace", address=running.address)
    assert "seen" in shown
    for phase in ("generate", "admit", "tokenize", "route", "schedule", "queue", "prefill", "decode", "deliver"):
        assert phase in shown
    assert "seen" in sluice("trace", "--list", address=running.address)
    assert sluice("trace", "--json", "seen", address=running.address).startswith('{"request_id": "seen"')


def test_a_collector_gets_every_services_spans_and_slow_steps_point_at_their_requests(own_cluster, twin: dict) -> None:
    async def ask(address: str) -> None:
        async with Client(address) as client:
            await asyncio.gather(*(collect(client, request) for request in mixed(6)[1:]))

    with Collector() as collector:
        with own_cluster(**twin, otlp_traces_endpoint=f"http://{collector.address}", slow_step_ms=1) as running:
            asyncio.run(ask(running.address))
        spans = collector.spans
    roots = {span.span_id for _, span in spans if span.name == "generate"}
    services = {(service, span.name) for service, span in spans}
    assert len(roots) == 5
    assert {("sluice-router", "schedule"), ("sluice-scheduler", "decode"), ("sluice-worker", "step")} <= services
    steps = [span for _, span in spans if span.name == "step"]
    linked = {link.span_id for step in steps for link in step.links}
    assert linked
    assert linked <= roots
