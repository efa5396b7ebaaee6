"""The Python client, with an event loop and without: the same answers, deadlines, cancellation and retries."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from services.cli.client import (
    Accepted,
    Answer,
    BlockingClient,
    CallError,
    Client,
    Delta,
    Event,
    FieldError,
    Finished,
    Message,
    Request,
)
from tests.builders.cluster import wait_for
from tests.cli.fake_router import FakeRouter, Served


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(FakeRouter()) as running:
        yield running


class Way:
    """One of the two clients. `events` come back with the error that ended them."""

    def __init__(self, blocking: bool) -> None:
        self.blocking = blocking

    def events(self, served: Served, request: Request, **options: Any) -> tuple[list[Event], CallError | None]:
        found: list[Event] = []
        try:
            if self.blocking:
                with BlockingClient(served.address) as client:
                    for event in client.generate(request, **options):
                        found.append(event)
            else:
                asyncio.run(self._gather(served, request, options, found))
        except CallError as error:
            return found, error
        return found, None

    async def _gather(self, served: Served, request: Request, options: dict[str, Any], found: list[Event]) -> None:
        async with Client(served.address) as client:
            async for event in client.generate(request, **options):
                found.append(event)

    def call(self, served: Served, name: str, *args: Any, **options: Any) -> Any:
        """A method with one answer."""
        if self.blocking:
            with BlockingClient(served.address) as client:
                return getattr(client, name)(*args, **options)

        async def ask() -> Any:
            async with Client(served.address) as client:
                return await getattr(client, name)(*args, **options)

        return asyncio.run(ask())


@pytest.fixture(params=[False, True], ids=["asynchronous", "blocking"])
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


WHOLE = [Accepted, Delta, Delta, Delta, Finished]


@pytest.mark.parametrize("retries", [0, 2])
def test_events_come_in_order(way: Way, served: Served, retries: int) -> None:
    events, error = way.events(served, Request(prompt="hi"), retries=retries)
    assert (kinds(events), error) == (WHOLE, None)


def test_a_whole_answer_has_every_sample_and_its_usage(way: Way, served: Served) -> None:
    answer: Answer = way.call(served, "complete", Request(prompt="hi", n=2, include_timing=True))
    assert answer.texts == ("Hello, wörld", "Hello, wörld")
    assert answer.text == answer.texts[0]
    assert answer.token_ids == ((0, 0, 0), (1, 1, 1))
    assert (answer.request_id, answer.seed, answer.reasons) == ("req-1", 7, ("stop", "stop"))
    assert answer.usage is not None and answer.usage.cached_tokens == 2
    assert answer.timing is not None and answer.timing.total_ns == 100_000_000


@pytest.mark.parametrize("prompt", ["busy", "lost"])
def test_a_request_refused_before_its_first_token_is_asked_again_when_the_server_says(
    way: Way, served: Served, prompt: str
) -> None:
    served.router.busy = 2
    begin = time.monotonic()
    events, error = way.events(served, Request(prompt=prompt), retries=2)
    assert (kinds(events), error) == (WHOLE, None)
    assert time.monotonic() - begin >= 0.1
    assert len(served.router.requests) == 3


def test_what_came_before_the_last_refusal_is_told_when_tries_are_used_up(way: Way, served: Served) -> None:
    served.router.busy = 9
    events, error = way.events(served, Request(prompt="lost"), retries=1)
    assert kinds(events) == [Accepted, Finished]
    assert error is not None and (error.status, error.retry_after_ms) == ("UNAVAILABLE", 50)
    assert len(served.router.requests) == 2


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (Request(prompt="break"), {"retries": 5}),  # tokens have been handed over
        (Request(prompt="hi", top_p=2.0), {"retries": 5}),  # it would be refused again
        (Request(prompt="busy"), {}),  # nobody asked for another try
        (Request(prompt="busy"), {"retries": 5, "timeout_s": 0.04}),  # too late for another
    ],
    ids=["begun", "invalid", "unasked", "late"],
)
def test_any_other_failure_is_told_at_once(
    way: Way, served: Served, request_: Request, options: dict[str, Any]
) -> None:
    served.router.busy = 9
    _, error = way.events(served, request_, **options)
    assert error is not None
    assert len(served.router.requests) == 1


def test_a_deadline_ends_the_call(way: Way, served: Served) -> None:
    events, error = way.events(served, Request(prompt="hang"), timeout_s=0.3)
    assert kinds(events) == WHOLE[:-1]
    assert error is not None and error.status == "DEADLINE_EXCEEDED"
    wait_for(lambda: served.router.cancelled == 1, 5, "the server knows")


def test_leaving_the_iteration_cancels_the_call(served: Served) -> None:
    with BlockingClient(served.address) as client:
        with client.generate(Request(prompt="hang")) as events:
            assert type(next(events)) is Accepted
        wait_for(lambda: served.router.cancelled == 1, 5, "the server knows")

    async def leave() -> None:
        async with Client(served.address) as client:
            async with aclosing(client.generate(Request(prompt="hang"))) as events:
                async for _ in events:
                    break
            await asyncio.to_thread(wait_for, lambda: served.router.cancelled == 2, 5, "the server knows")

    asyncio.run(leave())


def test_another_thread_can_cancel_a_stream(served: Served) -> None:
    with BlockingClient(served.address) as client:
        events = client.generate(Request(prompt="hang"))
        next(events)
        threading.Timer(0.1, events.cancel).start()
        with pytest.raises(CallError) as caught:
            list(events)
        assert caught.value.status == "CANCELLED"


def test_a_cancel_ends_the_wait_for_a_next_try_at_once(served: Served) -> None:
    served.router.busy, served.router.retry_after_ms = 1, 20_000
    with BlockingClient(served.address) as client:
        events = client.generate(Request(prompt="busy"), retries=1)

        def cancel_while_it_waits() -> None:
            wait_for(lambda: len(served.router.requests) == 1, 5, "the first try")
            time.sleep(0.3)
            events.cancel()

        cancelling = threading.Thread(target=cancel_while_it_waits)
        cancelling.start()
        began = time.monotonic()
        with pytest.raises(CallError) as caught:
            list(events)
        cancelling.join()
        assert caught.value.status == "CANCELLED" and time.monotonic() - began < 5
        assert len(served.router.requests) == 1


def test_a_cancel_reaches_a_call_that_is_just_being_made(served: Served) -> None:
    with BlockingClient(served.address) as client:
        stubs = client._stubs
        events = client.generate(Request(prompt="hang"), timeout_s=5)

        def generate(*args: Any, **options: Any) -> Any:
            events.cancel()  # as another thread may, before the call is known
            return stubs.inference.Generate(*args, **options)

        events._stubs = SimpleNamespace(inference=SimpleNamespace(Generate=generate))  # type: ignore[assignment]
        with pytest.raises(CallError) as caught:
            list(events)
        assert caught.value.status == "CANCELLED"


def test_a_value_that_does_not_fit_is_named_before_anything_is_sent(way: Way, served: Served) -> None:
    with pytest.raises(FieldError) as caught:
        way.call(served, "complete", Request(prompt="hi", seed=-1))
    assert caught.value.field == "seed"
    assert not served.router.requests


@pytest.mark.parametrize("more", [{"token_ids": (1,)}, {"messages": (Message("user", "hi"),)}])
def test_a_second_input_is_refused_and_not_dropped(way: Way, served: Served, more: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="prompt is given too") as caught:
        way.call(served, "complete", Request(prompt="hi", **more))
    assert [caught.value.field] == list(more)
    assert not served.router.requests


def test_models_load_and_the_rest_are_told(way: Way, served: Served) -> None:
    assert [model.name for model in way.call(served, "list_models")] == ["twin"]
    assert way.call(served, "abort", "req-1") is True
    assert way.call(served, "abort", "other") is False
    assert way.call(served, "server_info").service == "router"
    assert way.call(served, "load").requests_in_flight == 2


def test_nobody_there_is_said_plainly(way: Way, served: Served) -> None:
    served.address = "127.0.0.1:9"
    with pytest.raises(CallError, match="nothing answers"):
        way.call(served, "connect", 0.2)
