"""`sluice up` with real services: ready, streaming, restarts, and nothing left behind."""

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from services.cli.client import CallError, Client, Delta, Event, Finished, Request
from tests.builders.cluster import READY_TIMEOUT_S, SLUICE, RunningCluster, is_alive, wait_for

pytestmark = pytest.mark.cluster

GREEDY = Request(prompt="def add(a, b):\n", temperature=0, max_tokens=16, include_timing=True)


def ask(address: str, request: Request = GREEDY, timeout_s: float = 60) -> list[Event]:
    async def call() -> list[Event]:
        async with Client(address) as client:
            return [event async for event in client.generate(request, timeout_s=timeout_s)]

    return asyncio.run(call())


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def ask_when_able(address: str, timeout_s: float = 60) -> str:
    """The answer, once the cluster serves again: a retryable status is asked again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return text_of(ask(address))
        except CallError as error:
            assert error.status == "UNAVAILABLE", error
            assert time.monotonic() < deadline, error
            time.sleep(0.1)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


def test_an_answer_streams_with_its_phases(cluster) -> None:
    events = ask(cluster().address)
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.usage is not None
    assert finished.timing is not None
    assert finished.usage.completion_tokens == sum(len(e.token_ids) for e in events if isinstance(e, Delta)) > 0
    t = finished.timing
    assert t.link_ns + t.queue_ns + t.prefill_ns + t.decode_ns == pytest.approx(t.schedule_ns, rel=0.01, abs=5e5)
    parts = t.admit_ns + t.tokenize_ns + t.route_ns + t.schedule_ns + t.deliver_ns
    assert parts == pytest.approx(t.total_ns, rel=0.01, abs=5e5)
    assert 0 < t.time_to_first_token_ns <= t.total_ns


def test_control_answers_for_the_whole_cluster(cluster) -> None:
    async def scenario(address: str) -> None:
        async with Client(address) as client:
            assert (await client.server_info()).service == "router"
            (model,) = await client.list_models()
            assert model.max_model_len > 0
            (group,) = (await client.load()).groups
            assert group.kv_blocks_total > 0
            assert not await client.abort("no-such-request")

    asyncio.run(scenario(cluster().address))


def test_ctrl_c_stops_all_and_leaves_nothing(own_cluster) -> None:
    before = shared_memory()
    with own_cluster() as c:
        ask(c.address)
        addresses = [c.ready["router"], c.ready["scheduler"], *c.ready["workers"]]
        assert all(listens(address) for address in addresses)
        assert c.stop(signal.SIGINT) == 0
        assert not any(listens(address) for address in addresses)
        said = c.tail()
    order = [said.index(f"stopping {name}") for name in ("router", "scheduler", "worker-0")]
    assert order == sorted(order)
    assert "Traceback" not in said
    wait_for(lambda: shared_memory() <= before, 30, "no shared memory of its own; another test's may come and go")
    assert not c._ready_file.exists()


@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.5])
def test_ctrl_c_before_it_is_ready_stops_well_too(after_s: float) -> None:
    process = subprocess.Popen(
        [*SLUICE, "up", "--grpc-port=0", "--threads=1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        wait_for(lambda: len(psutil.Process(process.pid).children()) == 3, 20, "three processes")
        children = [child.pid for child in psutil.Process(process.pid).children()]
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.wait(30) == 0, said
    assert "Traceback" not in said
    assert not any(is_alive(pid) for pid in children)


def test_a_killed_service_is_reported_restarted_and_serves_again(own_cluster) -> None:
    with own_cluster() as c:
        expected = text_of(ask(c.address))
        for name in ("worker-0", "scheduler", "router"):
            address = c.address
            old = c.kill_service(name)
            c.wait_restarted(name, old)
            assert c.address == address
            assert ask_when_able(c.address) == expected, name
            assert f"{name} was killed by SIGKILL" in c.tail()
        c.assert_idle()


def test_children_die_with_a_supervisor_that_is_killed(own_cluster) -> None:
    with own_cluster() as c:
        pids = [c.pid(name) for name in ("router", "scheduler", "worker-0")]
        os.kill(c.process.pid, signal.SIGKILL)
        c.process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in pids), 5, "the children are gone")


def test_a_second_signal_stops_a_slow_drain_at_once(own_cluster) -> None:
    with own_cluster(shutdown_timeout=60.0) as c:

        async def scenario() -> float:
            async with Client(c.address) as client:
                endless = Request(prompt="x", ignore_eos=True, temperature=0)
                events = client.generate(endless)
                await anext(events)
                began = time.monotonic()
                c.process.send_signal(signal.SIGINT)
                await asyncio.sleep(0.3)
                c.process.send_signal(signal.SIGINT)
                await asyncio.to_thread(c.process.wait, 30)
                await events.aclose()
                return time.monotonic() - began

        assert asyncio.run(scenario()) < 10


def test_a_drained_router_ends_the_cluster_well(own_cluster) -> None:
    with own_cluster() as c:

        async def drain() -> None:
            async with c.client() as client:
                await client.drain()

        asyncio.run(drain())
        assert c.process.wait(30) == 0


def test_two_workers_serve_under_one_scheduler(own_cluster) -> None:
    with own_cluster(workers=2) as c:
        assert len(c.ready["workers"]) == 2
        wait_for(lambda: len(c.load().groups) == 2, 5, "both groups are known to the router")
        assert text_of(ask(c.address))


def up(*arguments: str, timeout: float = READY_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    command = [*SLUICE, "up", "--grpc-port=0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2), done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in error
    assert "Traceback" not in done.stderr


def test_no_such_model_is_said_and_everything_stops() -> None:
    assert_refused(up("--model=/nowhere/model"), "/nowhere/model")


def test_too_little_memory_is_said_and_everything_stops() -> None:
    assert_refused(up(f"--kv-cache-memory-bytes={2**50}"), "memory")


def test_a_folder_that_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    assert_refused(up(f"--model={tmp_path}"), str(tmp_path))


def test_a_free_port_that_is_taken_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began = time.monotonic()
        assert_refused(up(f"--scheduler-port={port}"), f"port {port} is taken", "--scheduler-port")
    assert time.monotonic() - began < 5


def test_the_demo_answers_shows_its_phases_and_leaves_nothing() -> None:
    mark = ("MARK_OF_THIS_TEST", secrets.token_hex(8))  # inherited: other tests start clusters meanwhile
    command, environ = [*SLUICE, "demo", "--threads=1"], dict([*os.environ.items(), mark])
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_TIMEOUT_S, env=environ)
    assert done.returncode == 0, done.stderr
    for word in ("admit", "tokenize", "route", "queue", "prefill", "decode", "deliver", "TTFT", "TPOT", "tokens/s"):
        assert word in done.stdout
    assert "sluice is ready" in done.stderr
    assert not [p for p in psutil.process_iter(["environ"]) if mark in (p.info["environ"] or {}).items()]


def test_the_keeping_demo_says_how_to_call_it_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as output:
        process = subprocess.Popen([*SLUICE, "demo", "--keep", "--threads=1"], stdout=output, stderr=output)
    try:

        def told() -> bool:
            assert process.poll() is None, out.read_text()
            return "Ctrl-C stops it." in out.read_text()

        wait_for(told, READY_TIMEOUT_S, "the ways to call it")
        children = [child.pid for child in psutil.Process(process.pid).children()]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not any(is_alive(pid) for pid in children)
    finally:
        process.kill()
        process.wait()
    for word in ("grpcurl -plaintext", "sluice chat --address", "/v1/completions", "BlockingClient("):
        assert word in out.read_text()


def test_a_cluster_that_does_not_come_up_is_an_error_of_the_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with"):
        RunningCluster(tmp_path, {"model": "/nowhere"})
