"""Places at the edge, with a clock of the test's own."""

import asyncio

import pytest

from services.router.admission import LONGEST_RETRY_MS, SHORTEST_RETRY_MS, UNKNOWN_RETRY_MS, Admission
from shared.clock import NS_PER_MS
from shared.outcome import AbortCause, RefusedError


class Time:
    def __init__(self):
        self.ms = 0

    def __call__(self):
        return self.ms * NS_PER_MS


def admission(places=2):
    clock = Time()
    return Admission(places, clock), clock


def serve(places, clock, number, every_ms):
    for i in range(number):
        with places.admit(f"served-{i}"):
            clock.ms += every_ms


def refused(places):
    with pytest.raises(RefusedError) as caught, places.admit("one-too-many"):
        pass
    return caught.value.refusal


def test_the_delay_is_what_the_measured_rate_promises():
    places, clock = admission(1)
    serve(places, clock, 64, 200)
    with places.admit("holder"):
        assert refused(places).retry_after_ms == pytest.approx(200, rel=0.05)
        assert refused(places).retry_after_ms == pytest.approx(400, rel=0.05)
    with places.admit("next"):
        assert refused(places).retry_after_ms == pytest.approx(200, rel=0.05)


def test_the_delay_has_bounds_and_a_first_guess():
    places, clock = admission(1)
    with places.admit("holder"):
        assert refused(places).retry_after_ms == UNKNOWN_RETRY_MS
    serve(places, clock, 64, 0)
    clock.ms += 1
    with places.admit("holder"):
        assert refused(places).retry_after_ms == SHORTEST_RETRY_MS
    serve(places, clock, 4, 40_000)
    with places.admit("holder"):
        assert refused(places).retry_after_ms == LONGEST_RETRY_MS


def test_idle_time_is_no_part_of_the_rate():
    places, clock = admission(1)
    serve(places, clock, 64, 200)
    clock.ms += 3_600_000
    with places.admit("first of a burst"):
        assert refused(places).retry_after_ms == pytest.approx(200, rel=0.05)
    with places.admit("second"):
        assert refused(places).retry_after_ms == UNKNOWN_RETRY_MS
    serve(places, clock, 40, 300)
    with places.admit("the next"):
        assert refused(places).retry_after_ms == pytest.approx(300, rel=0.05)


def test_a_place_is_given_back_whatever_ends_the_block():
    places, _ = admission()
    with pytest.raises(ZeroDivisionError), places.admit("a"):
        raise ZeroDivisionError
    assert len(places) == 0


def test_an_abort_reaches_whoever_answers_once_and_even_if_it_came_first():
    places, _ = admission()
    told = []
    with places.admit("a") as place:
        assert places.abort("a", AbortCause.CLIENT)
        assert places.abort("a", AbortCause.DRAIN)
        place.on_abort(told.append)
        assert places.abort("a", AbortCause.STALLED)
    assert told == [AbortCause.CLIENT]
    assert not places.abort("a", AbortCause.CLIENT)


def test_draining_refuses_and_empties():
    async def test():
        places, _ = admission()
        with places.admit("a"):
            places.draining = True
            assert refused(places).name == "draining"
            assert not await places.wait_empty(0.01)
        assert await places.wait_empty(0.01)

    asyncio.run(test())
