"""HTTP calls that end early: clients that go or stall, schedulers that are lost, drains."""

import asyncio
import json
import socket
import struct

import pytest

from services.router.http import door
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from tests.builders.fake_scheduler import FakeScheduler
from tests.builders.http import answer_next, asking, events, read_events, texts
from tests.builders.router import run, running_router, until
from tests.builders.scrape import scrape

PATH = "/v1/completions"
EVERY = -1


def endless(request, index):
    return [300 + i % 90 for i in range(100_000)]


def raw(body: dict) -> bytes:
    """The bytes of a call."""
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connect(router) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = router.http.rpartition(":")
    return await asyncio.open_connection(host, int(port))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["the fox", ["the fox", "a dog"]], ids=["one", "two"])
def test_a_client_that_goes_is_an_abort_at_once(tiny_model, stream, prompt):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router:
            reader, writer = await connect(router)
            writer.write(raw({"prompt": prompt, "stream": stream}))
            number = 1 if isinstance(prompt, str) else len(prompt)
            requests = [await scheduler.request(at) for at in range(number)]
            if stream:
                requests[0].tokens([300])
                assert b" 200 " in await reader.readline()
            writer.close()
            async with asyncio.timeout(1):
                for request in requests:
                    await request.aborted.wait()
                    assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_CLIENT)]
            await router.idle()
            said = await asyncio.to_thread(scrape, router.http)
            assert said.labels("request_success_total", "finished_reason")["abort"] == number

    run(test())


def test_a_connection_that_is_reset_is_an_abort_too(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=endless, step_s=0.001)
        async with running_router(tiny_model, scheduler) as router:
            reader, writer = await connect(router)
            writer.write(raw({"prompt": "the fox", "stream": True, "max_tokens": 400}))
            await reader.readline()
            caller = writer.get_extra_info("socket")
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            async with asyncio.timeout(1):
                await (await scheduler.request()).aborted.wait()
            await router.idle()

    run(test())


def test_a_client_that_does_not_read_is_ended_and_hung_up_on(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, stall_timeout_ms=300) as router:
            _, writer = await connect(router)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.transport.pause_reading()
            writer.write(raw({"prompt": "the fox", "stream": True, "return_token_ids": True}))
            request = await scheduler.request()
            for _ in range(2000):
                if request.aborts:
                    break
                request.tokens([300] * 1000)
                await asyncio.sleep(0.005)
            assert request.aborts == [(EVERY, scheduling_pb2.ABORT_CAUSE_STALLED)]
            await router.idle()
            connections = router.router._http._server.server_state.connections
            await until(lambda: not connections, timeout_s=2)
            writer.transport.abort()

    run(test())


def test_a_failure_in_mid_stream_is_an_event_and_the_end(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            call = asyncio.create_task(client.post(PATH, json={"prompt": "the fox", "stream": True}))
            request = await scheduler.request()
            request.tokens([300])
            await asyncio.sleep(0.1)
            request.release("worker_lost", message="the worker is gone")
            *chunks, last = read_events((await call).text)
            assert len(chunks) == 1
            assert json.loads(last)["error"] == {
                "message": "the worker is gone",
                "type": "server_error",
                "param": None,
                "code": "worker_lost",
            }
            whole = asyncio.create_task(client.post(PATH, json={"prompt": "the fox"}))
            request = await scheduler.request(1)
            request.tokens([300])
            request.release("worker_lost", message="the worker is gone")
            assert (await whole).status_code == 503

    run(test())


def test_an_abort_by_id_ends_a_stream(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            ask = {"prompt": "the fox", "stream": True, "request_id": "mine"}
            call = asyncio.create_task(client.post(PATH, json=ask))
            (await scheduler.request()).tokens([300])
            await asyncio.sleep(0.1)
            assert (await router.inference.Abort(pb.AbortRequest(request_id="mine"))).found
            assert json.loads(read_events((await call).text)[-1])["error"]["code"] == "cancelled"

    run(test())


def test_a_drain_lets_open_streams_end_and_refuses_new_calls(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            call = asyncio.create_task(client.post(PATH, json={"prompt": "the fox", "stream": True}))
            request = await scheduler.request()
            router.router.stop()
            await until(lambda: router.router.admission.draining)
            said = await client.post(PATH, json={"prompt": "the fox"})
            assert (said.status_code, said.json()["error"]["code"]) == (503, "draining")
            assert (await client.get("/health")).status_code == 503
            request.tokens([264])
            request.end()
            request.release()
            assert texts(events((await call).text)) == {0: "the"}
            assert await router.serving == 0

    run(test())


def test_a_drain_that_takes_too_long_tells_the_clients_it_cuts_off(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler, shutdown_timeout=0.2) as router, asking(router) as client:
            calls = [
                asyncio.create_task(client.post(PATH, json={"prompt": "the fox", "stream": stream}))
                for stream in (True, False)
            ]
            for number in range(2):
                (await scheduler.request(number)).tokens([300])
            await asyncio.sleep(0.1)
            router.router.stop()
            streamed, whole = await asyncio.gather(*calls)
            assert json.loads(read_events(streamed.text)[-1])["error"]["code"] == "draining"
            assert (whole.status_code, whole.json()["error"]["code"]) == (503, "draining")
            assert await router.serving == 0

    run(test())


def test_a_second_prompt_that_fails_ends_the_first(tiny_model):
    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            call = asyncio.create_task(client.post(PATH, json={"prompt": ["the fox", "a dog"], "stream": True}))
            first, second = [await scheduler.request(number) for number in range(2)]
            second.release("no_worker", message="not now", retry_after_ms=100)
            said = await call
            assert (said.status_code, said.json()["error"]["code"]) == (503, "no_worker")
            await first.aborted.wait()
            await router.idle()
            again = asyncio.create_task(client.post(PATH, json={"prompt": "the fox"}))
            await answer_next(scheduler, 2, [9])
            assert (await again).status_code == 200

    run(test())


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x00\xff\r\n\r\n", b"GET", b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000, b"GET /" + b"a" * 70_000],
    ids=["nothing", "no sense", "a beginning", "a long header", "a long path"],
)
def test_callers_who_make_no_sense_hold_up_nobody(tiny_model, monkeypatch, sent):
    monkeypatch.setattr(door, "HEAD_TIMEOUT_S", 0.2)

    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router, asking(router) as client:
            reader, writer = await connect(router)
            writer.write(sent)
            assert (await client.get("/health")).status_code == 200
            async with asyncio.timeout(3):
                said = await reader.read()
            assert said == b"" or b" 400 " in said
            writer.close()

    run(test())


@pytest.mark.parametrize("begun", [b"GET /health HTTP/1.1\r\nx: y", b"\r\n"], ids=["a head", "an empty line"])
def test_a_head_that_does_not_end_is_late_on_a_used_connection_too(tiny_model, monkeypatch, begun):
    monkeypatch.setattr(door, "HEAD_TIMEOUT_S", 0.4)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

    async def test():
        async with running_router(tiny_model, FakeScheduler()) as router:
            reader, writer = await connect(router)
            for wait_s in (0.6, 0.1):  # between requests a connection may rest for longer
                writer.write(whole)
                head = await reader.readuntil(b"\r\n\r\n")
                assert b" 200 " in head
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                await reader.readexactly(int(length.split(b":")[1]))
                await asyncio.sleep(wait_s)
            async with asyncio.timeout(3):
                for byte in begun:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.01)
                assert await reader.read() == b""
            writer.close()

    run(test())


def test_an_answer_may_take_longer_than_a_head(tiny_model, monkeypatch):
    monkeypatch.setattr(door, "HEAD_TIMEOUT_S", 0.1)

    async def test():
        scheduler = FakeScheduler(answer=None)
        async with running_router(tiny_model, scheduler) as router, asking(router) as client:
            call = asyncio.create_task(client.post(PATH, json={"prompt": "the fox"}))
            await scheduler.request()
            await asyncio.sleep(0.3)
            await answer_next(scheduler, 0, [9])
            assert (await call).status_code == 200

    run(test())
