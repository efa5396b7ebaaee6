"""kill -9 of each service. With another worker beside it nothing is lost; otherwise a clear end within a second, a
restart, and service again."""

import asyncio
import random
import time

import pytest

from services.cli.client import Client, Request
from tests.builders.answers import Answer, ask_all, collect
from tests.builders.cluster import RunningCluster, wait_for
from tests.counts import count

pytestmark = pytest.mark.cluster

STREAMS = 8
CLEAR_END_S = 1.0


def requests_of(seed: int, tokens: int = 48) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            token_ids=tuple(rng.randrange(2, 384) for _ in range(rng.randrange(4, 60))),
            temperature=float(i % 2),
            seed=i,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=0,
        )
        for i in range(STREAMS)
    ]


async def kill_in_mid_stream(cluster: RunningCluster, name: str, requests: list[Request], after: int) -> list[Answer]:
    """All requests at once; the service is killed when their answers hold `after` tokens together."""
    killed = asyncio.Event()
    answers: list[Answer] = []

    def watch(answer: Answer) -> None:
        if answer not in answers:
            answers.append(answer)
        if not killed.is_set() and sum(len(a.only) for a in answers) >= after:
            killed.set()
            cluster.kill_service(name)

    async with Client(cluster.address) as client:
        done = await asyncio.gather(*(collect(client, request, on_delta=watch) for request in requests))
    assert killed.is_set(), "the service was killed while they streamed"
    return list(done)


def test_a_killed_worker_beside_another_costs_no_token(own_cluster, twin: dict) -> None:
    kills = count("worker_kills")
    batches = [requests_of(seed) for seed in range(min(kills, 5))]
    with own_cluster(workers=2, **twin) as cluster:
        undisturbed = [ask_all(cluster.address, batch) for batch in batches]
        assert all(answer.status == "OK" for answers in undisturbed for answer in answers)
        for kill in range(kills):
            name = f"worker-{kill % 2}"
            pid = cluster.pid(name)
            batch = kill % len(batches)
            answers = asyncio.run(kill_in_mid_stream(cluster, name, batches[batch], after=20 + 37 * kill % 250))
            for answer, expected in zip(answers, undisturbed[batch], strict=True):
                assert answer.status == "OK", answer.error
                assert answer.only == expected.only
                assert answer.raw_logprobs == expected.raw_logprobs
            cluster.wait_restarted(name, pid)
            wait_for(lambda: len(cluster.load().groups) == 2, 30, "both workers are registered again")
        cluster.assert_idle()


@pytest.mark.parametrize("name", ["worker-0", "scheduler", "router"])
def test_the_only_one_of_its_kind_killed_ends_streams_clearly_and_comes_back(
    own_cluster, twin: dict, name: str
) -> None:
    requests = requests_of(1, tokens=300)
    with own_cluster(**twin) as cluster:
        pid = cluster.pid(name)
        ended: list[float] = []

        async def run() -> tuple[list[Answer], float]:
            async with Client(cluster.address) as client:
                first = asyncio.Event()
                tasks = [
                    asyncio.create_task(collect(client, request, on_delta=lambda _: first.set()))
                    for request in requests
                ]
                for task in tasks:
                    task.add_done_callback(lambda _: ended.append(time.monotonic()))
                await asyncio.wait_for(first.wait(), 30)
                killed = time.monotonic()
                cluster.kill_service(name)
                return list(await asyncio.gather(*tasks)), killed

        answers, killed = asyncio.run(run())
        assert {answer.status for answer in answers} == {"UNAVAILABLE"}
        assert max(ended) - killed < CLEAR_END_S
        if name != "router":
            assert all(answer.ends[0].reason == "error" for answer in answers if answer.ends)
            assert all(answer.error.retry_after_ms > 0 for answer in answers)
        cluster.wait_restarted(name, pid)
        wait_for(lambda: serves_again(cluster), 30, f"service again after the {name} was killed")
        cluster.assert_idle()


def serves_again(cluster: RunningCluster) -> bool:
    return {answer.status for answer in ask_all(cluster.address, requests_of(2, tokens=8))} == {"OK"}
