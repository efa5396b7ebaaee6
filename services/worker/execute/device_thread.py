"""The one thread that owns the device: plans in, results out, in order. Torch-free.

The event loop drops work in the inbox and goes on; a step never blocks it. After a failed step nothing runs until the
next epoch begins, because slots and pages are then in doubt.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from services.worker.plan import PlanError, StepError, StepPlan, StepResult, StepRunner
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
        self._inbox: queue.SimpleQueue[_Begin | _Step | None] = queue.SimpleQueue()
        self._pending_plans = 0
        self._epoch = 0
        self._failed_step: int | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    @property
    def progress(self) -> int:
        """Grows with every step and every layer of one: the thread is alive, however long a step takes."""
        return self.steps_done + self._runner.layers_done

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
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
            else:
                result = self._run(work)
                self._call_on_loop(self._settle, work.deliver, result)

    def _reset(self, begin: _Begin) -> None:
        try:
            self._runner.reset()
        except Exception as error:
            _log_failure("reset_failed", error, epoch=begin.epoch)
            self._call_on_loop(_fail, begin.done, error)
            return
        self._failed_step = None
        self._call_on_loop(_finish, begin.done)

    def _run(self, work: _Step) -> StepResult | None:
        """One plan's answer; None where nobody waits for it any more."""
        if work.epoch != self._epoch or self._stopping:
            return None
        step = work.plan.step
        started_ns = self._now_ns()
        wait_ns = started_ns - work.arrived_ns
        if self._failed_step is not None:
            self.steps_done += 1
            return StepResult(step=step, wait_ns=wait_ns, error=f"skipped: step {self._failed_step} failed")
        try:
            output = self._runner.run(work.plan)
        except Exception as error:
            self._failed_step = step
            self.steps_done += 1
            _log_failure("step_failed", error, step=step, epoch=work.epoch)
            return StepResult(step=step, wait_ns=wait_ns, run_ns=self._now_ns() - started_ns, error=_short(error))
        self.steps_done += 1
        return StepResult(step=step, output=output, wait_ns=wait_ns, run_ns=self._now_ns() - started_ns)

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
