"""The one thread that owns the device: plans in, results out, in order. Torch-free.

The event loop drops work in the inbox and goes on; a step never blocks it. After a failed step nothing runs until the
next epoch begins, because slots and pages are then in doubt.

Where the device computes on its own, a plan that arrives is begun while the step before still computes, so that the
device finds its next work waiting. A second thread does nothing but wait for steps and say so in the inbox: the device
thread then sleeps on one queue, whatever comes first. Where a step is over when it has begun, its result leaves before
the next one begins.

A device that is lost answers nothing more: the process is to end, and the scheduler plans its requests again.
"""

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.worker.plan import (
    MAX_BEGUN_STEPS,
    DeviceLostError,
    PendingStep,
    PlanError,
    StepError,
    StepPlan,
    StepResult,
    StepRunner,
)
from shared.clock import NowNs, monotonic_ns

log = structlog.get_logger("device")

MAX_PENDING_PLANS = 8
"""A scheduler keeps at most two plans in flight; one more epoch's may wait to be dropped."""
MAX_ERROR_CHARS = 300

Deliver = Callable[[StepResult], None]


class InboxFullError(Exception):
    """More plans are pending than a scheduler may have in flight."""


@dataclass(slots=True)
class _Begin:
    epoch: int
    done: "asyncio.Future[None]"


@dataclass(slots=True)
class _Step:
    epoch: int
    plan: StepPlan
    arrived_ns: int
    deliver: Deliver


@dataclass(slots=True, eq=False)
class _Begun:
    """A step that was begun and not finished."""

    work: _Step
    pending: PendingStep
    started_ns: int


@dataclass(slots=True)
class _Computed:
    """What the waiting thread says."""

    begun: _Begun


class DeviceThread:
    """Runs `runner` on its own thread. Every method is for the event loop's thread.

    Owns the inbox and the epoch; the runner owns slots and pages. The thread outlives streams and failed steps.
    """

    def __init__(
        self, runner: StepRunner, *, now_ns: NowNs = monotonic_ns, max_pending_plans: int = MAX_PENDING_PLANS
    ) -> None:
        self.steps_done = 0
        """Plans answered so far, failed ones included."""
        self._runner = runner
        self._now_ns = now_ns
        self._max_pending_plans = max_pending_plans
        self._inbox: queue.SimpleQueue[_Begin | _Step | _Computed | None] = queue.SimpleQueue()
        self._begun: deque[_Begun] = deque()
        self._awaited: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None
        self._free_ns = 0  # since when the device has had nothing but the oldest step that was begun
        self._pending_plans = 0
        self._epoch = 0
        self._failed_step: int | None = None
        self._is_lost = False
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    @property
    def progress(self) -> int:
        """Grows with every step and every layer of one: the thread is alive, however long a step takes."""
        return self.steps_done + self._runner.layers_done

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Gets DeviceLostError as its exception when the device takes no more work."""
        self._thread.start()

    async def begin(self, epoch: int) -> None:
        """Drops all slots, and at once every plan of an older epoch that has not started. Returns when it is done."""
        self._epoch = epoch
        done = self._loop.create_future()
        self._inbox.put(_Begin(epoch, done))
        await done

    def submit(self, plan: StepPlan, *, epoch: int, arrived_ns: int, deliver: Deliver) -> None:
        """Queues one plan; `deliver` is called on the event loop, unless a newer epoch or the stop drops the plan.

        Raises InboxFullError.
        """
        if self._pending_plans >= self._max_pending_plans:
            raise InboxFullError(f"{self._pending_plans} plans are pending already")
        self._pending_plans += 1
        self._inbox.put(_Step(epoch, plan, arrived_ns, deliver))

    async def stop(self, timeout_s: float) -> bool:
        """Lets the step in flight finish and drops the others. False if it took longer than `timeout_s`."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (work := self._inbox.get()) is not None:
            if isinstance(work, _Begin):
                self._reset(work)
            elif isinstance(work, _Step):
                self._start(work)
            elif self._begun and work.begun is self._begun[0]:
                self._finish_oldest()
        self._finish_all()
        if self._waiter is not None:
            self._awaited.put(None)

    def _reset(self, begin: _Begin) -> None:
        while self._begun:
            self._answer(self._begun.popleft().work, None)
        try:
            self._runner.reset()
        except Exception as error:
            _log_failure("reset_failed", error, epoch=begin.epoch)
            self._call_on_loop(_fail, begin.done, error)
            return
        self._failed_step = None
        self._call_on_loop(_finish, begin.done)

    def _start(self, work: _Step) -> None:
        """Begins one plan, and answers it where its step is over by then."""
        if work.epoch != self._epoch or self._stopping or self._is_lost:
            self._answer(work, None)
            return
        while len(self._begun) >= MAX_BEGUN_STEPS:
            self._finish_oldest()
        started_ns = self._now_ns()
        if self._failed_step is not None:
            self._skip(work, started_ns)
            return
        try:
            pending = self._runner.begin(work.plan)
        except Exception as error:
            self._finish_all()  # those before it come first, and one of them may be what went wrong
            self._fail(work, started_ns, error)
            return
        begun = _Begun(work, pending, started_ns)
        self._begun.append(begun)
        if pending.is_computed:
            self._finish_all()
        else:
            self._wait_for(begun)

    def _finish_all(self) -> None:
        while self._begun:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        begun = self._begun.popleft()
        work, started_ns = begun.work, max(begun.started_ns, self._free_ns)
        if self._failed_step is not None:
            self._skip(work, begun.started_ns)
            return
        try:
            output = self._runner.finish(begun.pending)
        except Exception as error:
            self._fail(work, started_ns, error)
            return
        self._free_ns = self._now_ns()
        wait_ns, run_ns = begun.started_ns - work.arrived_ns, self._free_ns - started_ns
        self._answer(work, StepResult(step=work.plan.step, output=output, wait_ns=wait_ns, run_ns=run_ns))

    def _fail(self, work: _Step, started_ns: int, error: Exception) -> None:
        if self._failed_step is not None:
            self._skip(work, started_ns)
            return
        self._failed_step = step = work.plan.step
        _log_failure("step_failed", error, step=step, epoch=work.epoch)
        if isinstance(error, DeviceLostError):
            self._is_lost = True
            self._answer(work, None)
            self._call_on_loop(_fail, self.lost, error)
            return
        wait_ns, run_ns = started_ns - work.arrived_ns, self._now_ns() - started_ns
        self._answer(work, StepResult(step=step, wait_ns=wait_ns, run_ns=run_ns, error=_short(error)))

    def _skip(self, work: _Step, started_ns: int) -> None:
        if self._is_lost:
            self._answer(work, None)
            return
        error = f"skipped: step {self._failed_step} failed"
        self._answer(work, StepResult(step=work.plan.step, wait_ns=started_ns - work.arrived_ns, error=error))

    def _answer(self, work: _Step, result: StepResult | None) -> None:
        """None where nobody waits for it any more."""
        if result is not None:
            self.steps_done += 1
        self._call_on_loop(self._settle, work.deliver, result)

    def _wait_for(self, begun: _Begun) -> None:
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait, name="device-wait", daemon=True)
            self._waiter.start()
        self._awaited.put(begun)

    def _wait(self) -> None:
        while (begun := self._awaited.get()) is not None:
            with contextlib.suppress(Exception):  # finishing the step raises it again
                begun.pending.wait()
            self._inbox.put(_Computed(begun))

    def _settle(self, deliver: Deliver, result: StepResult | None) -> None:
        self._pending_plans -= 1
        if result is not None:
            deliver(result)

    def _call_on_loop(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._loop.is_closed():  # a closed loop means that the process is ending
                raise


def _log_failure(event: str, error: Exception, **facts: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # a standard error that is closed must not end the thread
        log.error(event, exc_info=error, **facts)


def _finish(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_result(None)


def _fail(done: "asyncio.Future[None]", error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


def _short(error: Exception) -> str:
    """The text for the scheduler: ours as it is, a foreign exception's type and first line."""
    if isinstance(error, PlanError | StepError):
        return str(error)[:MAX_ERROR_CHARS]
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:MAX_ERROR_CHARS]
