"""Traces of slow steps: one span each, linked to the requests that were in it."""

import random
import time
from collections.abc import Callable

from services.worker.plan import StepPlan, StepResult
from shared.clock import NS_PER_MS, NowNs
from shared.telemetry import names
from shared.telemetry.spans import Span, Trace

LINK_BYTES = 24


class StepTraces:
    """Owned by the process that hosts the device; called on its loop, once a step, after the result is on its way."""

    def __init__(
        self, slow_step_ms: int, export: Callable[[Trace], None], *, instance: str, wall: NowNs = time.time_ns
    ) -> None:
        self._slow_ns = slow_step_ms * NS_PER_MS
        self._export = export
        self._instance = instance
        self._wall = wall
        self._draw = random.Random()
        self._by_slot: dict[int, bytes] = {}

    def on_result(self, plan: StepPlan, result: StepResult) -> None:
        for admit in plan.admits:
            self._by_slot[admit.slot] = admit.trace
        if result.run_ns < self._slow_ns:
            return
        inside = (self._by_slot.get(slot, b"") for slot in plan.slots.tolist())
        links = tuple(dict.fromkeys(link for link in inside if len(link) == LINK_BYTES))
        if links:
            self._export(self._trace(plan, result, links))

    def _trace(self, plan: StepPlan, result: StepResult, links: tuple[bytes, ...]) -> Trace:
        span = Span(
            name=names.STEP,
            service="worker",
            instance=self._instance,
            parent=-1,
            start_ns=0,
            end_ns=result.run_ns,
            attributes={
                names.STEP_NUMBER: plan.step,
                names.STEP_ROWS: len(plan.slots),
                names.STEP_TOKENS: int(plan.counts.sum()),
                names.STEP_ADMITTED: len(plan.admits),
                names.STEP_EXACT: plan.exact,
                names.STEP_WAIT_MS: round(result.wait_ns / NS_PER_MS, 3),
            },
            error=result.error,
            links=links,
        )
        return Trace(
            request_id="",
            trace_id=self._draw.getrandbits(128).to_bytes(16, "big"),
            root_id=self._draw.getrandbits(64).to_bytes(8, "big"),
            parent_id=b"",
            sampled=True,
            arrived_ns=self._wall() - result.run_ns,
            spans=[span],
        )
