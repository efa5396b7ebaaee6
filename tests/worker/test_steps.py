"""Slow steps leave a span that points at the requests in it; others leave nothing."""

import pytest

from services.worker.plan import StepResult
from services.worker.steps import StepTraces
from tests.builders.plans import make_admit, make_plan

ONE, TWO = b"a" * 24, b"b" * 24


def traced(slow_step_ms=10):
    exported = []
    return StepTraces(slow_step_ms, exported.append, instance="w", wall=lambda: 10**18), exported


def plan(slots, admits=()):
    return make_plan(1, [(slot, 3, False, ()) for slot in slots], admits)


def admit(slot, trace):
    return make_admit(slot, [1, 2, 3], trace=trace)


def test_a_slow_step_is_linked_to_the_requests_in_it_once_each():
    steps, exported = traced()
    admits = [admit(slot, trace) for slot, trace in ((0, ONE), (1, TWO), (2, ONE), (3, b""))]
    steps.on_result(plan([0, 1, 2, 3], admits), StepResult(step=1, run_ns=9_000_000))
    assert exported == []
    steps.on_result(plan([0, 1, 2, 3]), StepResult(step=2, run_ns=20_000_000, wait_ns=1_000_000))
    [trace] = exported
    [span] = trace.spans
    assert span.links == (ONE, TWO)
    assert (span.duration_ns, trace.arrived_ns) == (20_000_000, 10**18 - 20_000_000)
    assert (span.attributes["sluice.step.rows"], span.attributes["sluice.step.tokens"]) == (4, 12)


@pytest.mark.parametrize("trace", [b"", b"short"])
def test_a_step_of_requests_that_nobody_samples_leaves_none(trace):
    steps, exported = traced()
    steps.on_result(plan([0], [admit(0, trace)]), StepResult(step=1, run_ns=10**9))
    assert exported == []


def test_a_slot_belongs_to_whoever_was_admitted_last():
    steps, exported = traced()
    steps.on_result(plan([0], [admit(0, ONE)]), StepResult(step=1, run_ns=0))
    steps.on_result(plan([0], [admit(0, TWO)]), StepResult(step=2, run_ns=10**9))
    assert exported[0].spans[0].links == (TWO,)
