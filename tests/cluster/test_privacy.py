"""Prompts and answers are nobody's business: no log, trace or metric repeats them, whatever becomes of a request."""

import asyncio
import contextlib
import json
import urllib.request

import pytest

from services.cli.client import CallError, Client, Message, Request
from tests.builders.answers import collect
from tests.builders.collector import Collector

pytestmark = pytest.mark.cluster

CANARY = "zyxwcanary"


def requests() -> list[Request]:
    said = f"my password is {CANARY}"
    return [
        Request(prompt=said, max_tokens=8),
        Request(messages=(Message("user", said),), max_tokens=8),
        Request(prompt=said, max_tokens=8, stop=(CANARY,)),
        Request(prompt=f"{said} " * 4000, max_tokens=8),  # too long
        Request(prompt=said, max_tokens=8, model=CANARY),  # no such model
        Request(prompt=said, temperature=-1.0),
        Request(messages=(Message("user", said),), template_kwargs_json=f'{{"broken {CANARY}'),
        Request(prompt=said, max_tokens=8, request_id="named", logprobs=2, prompt_logprobs=1),
    ]


def test_a_flag_lets_prompts_and_answers_into_the_routers_log(own_cluster) -> None:
    async def ask(address: str) -> str:
        async with Client(address) as client:
            return (await collect(client, Request(prompt=f"def {CANARY}(", max_tokens=8, request_id="told"))).texts[0]

    with own_cluster(log_content=True) as cluster:
        answer = asyncio.run(ask(cluster.address))
    told = [json.loads(line[line.index("{") :]) for line in cluster.log_file.read_text().splitlines() if CANARY in line]
    assert [(line["event"], line["request_id"], line["answers"]) for line in told] == [("request", "told", [answer])]
    assert CANARY in told[0]["prompt"]["text"]


def test_a_canary_in_a_prompt_is_found_nowhere(own_cluster) -> None:
    async def ask(address: str) -> str:
        async with Client(address) as client:
            for request in requests():
                await collect(client, request)
            # One is cut off by its client, one by a worker that dies.
            with contextlib.suppress(CallError):
                async with contextlib.aclosing(client.generate(requests()[0])) as events:
                    async for _ in events:
                        break
            doomed = asyncio.create_task(collect(client, Request(prompt=CANARY, max_tokens=400, ignore_eos=True)))
            await asyncio.sleep(0.2)
            killed = cluster.kill_service("worker-0")
            await doomed
            await asyncio.to_thread(cluster.wait_restarted, "worker-0", killed)
            return repr(await client.traces(100))

    with (
        Collector() as collector,
        own_cluster(otlp_traces_endpoint=f"http://{collector.address}", slow_step_ms=1) as cluster,
    ):
        traces = asyncio.run(ask(cluster.address))
        metrics = [
            urllib.request.urlopen(f"http://{cluster.http(name)}/metrics").read().decode()
            for name in ("router", "scheduler", "worker-0")
        ]
    assert "named" in traces
    sent = repr(collector.spans)
    assert "named" in sent
    assert CANARY not in sent
    assert all("sluice:" in text for text in metrics)
    assert CANARY not in "".join(metrics)
    assert CANARY not in traces
    log = cluster.log_file.read_text()
    assert '"event": "request"' in log
    assert "trace_id" in log
    lines = [line for line in log.splitlines() if CANARY in line]
    assert lines == []
