"""The device thread around a runner whose steps compute on their own until a test lets them end."""

import asyncio
import collections
import threading

import numpy as np

from services.worker.execute.device_thread import DeviceThread
from services.worker.plan import StepError, StepOutput, WholeStepRunner
from tests.builders.plans import make_plan

TIMEOUT_S = 5.0


class LateStep:
    is_computed = False

    def __init__(self, step):
        self.step = step
        self.computed = threading.Event()

    def wait(self):
        assert self.computed.wait(TIMEOUT_S)


class LateRunner:
    """`broken_begins` and `broken_finishes` are step numbers."""

    layers_done = 0

    def __init__(self, broken_begins=(), broken_finishes=()):
        self.broken_begins, self.broken_finishes = broken_begins, broken_finishes
        self.steps, self.finished, self.resets = {}, [], 0
        self.most_begun = 0
        self._began = collections.defaultdict(threading.Event)

    def began(self, step):
        """An event that is set once the step was begun."""
        return self._began[step]

    def begin(self, plan):
        if plan.step in self.broken_begins:
            raise StepError(f"cannot begin {plan.step}")
        self.steps[plan.step] = LateStep(plan.step)
        self.most_begun = max(self.most_begun, len(self.steps) - len(self.finished))
        self._began[plan.step].set()
        return self.steps[plan.step]

    def finish(self, pending):
        pending.wait()
        self.finished.append(pending.step)
        if pending.step in self.broken_finishes:
            raise StepError(f"broken {pending.step}")
        return StepOutput(tokens=np.array([pending.step], np.uint32))

    def reset(self):
        self.resets += 1


class Driven:
    def __init__(self, runner):
        self.runner = runner
        self.thread = DeviceThread(runner)
        self.results = asyncio.Queue()

    def submit(self, *steps, epoch=1):
        for step in steps:
            self.thread.submit(make_plan(step), epoch=epoch, arrived_ns=0, deliver=self.results.put_nowait)

    async def begun(self, step):
        assert await asyncio.to_thread(self.runner.began(step).wait, TIMEOUT_S)

    async def result(self):
        result = await asyncio.wait_for(self.results.get(), TIMEOUT_S)
        return result.step, result.error or result.output.tokens.tolist()


def driven(runner, scenario):
    async def run():
        it = Driven(runner)
        it.thread.start()
        await it.thread.begin(1)
        try:
            await asyncio.wait_for(scenario(it), 20)
        finally:
            for step in it.runner.steps.values():
                step.computed.set()
            assert await it.thread.stop(TIMEOUT_S)

    asyncio.run(run())


def test_a_plan_is_begun_while_the_step_before_it_still_computes():
    async def scenario(it):
        it.submit(1)
        await it.begun(1)
        it.submit(2)
        await it.begun(2)
        assert it.results.empty()
        it.runner.steps[1].computed.set()
        assert await it.result() == (1, [1])
        it.submit(3)
        await it.begun(3)
        for step in (2, 3):
            it.runner.steps[step].computed.set()
            assert await it.result() == (step, [step])
        assert it.thread.steps_done == 3

    driven(LateRunner(), scenario)


def test_no_more_than_two_steps_are_begun_at_once():
    async def scenario(it):
        it.submit(1, 2, 3)
        await it.begun(2)
        await asyncio.sleep(0.02)
        assert 3 not in it.runner.steps
        it.runner.steps[1].computed.set()
        await it.begun(3)
        assert it.runner.most_begun == 2

    driven(LateRunner(), scenario)


def test_a_step_that_cannot_begin_is_answered_behind_those_before_it():
    async def scenario(it):
        it.submit(1)
        await it.begun(1)
        it.submit(2, 3)
        await asyncio.sleep(0.02)
        assert it.results.empty()
        it.runner.steps[1].computed.set()
        assert [await it.result() for _ in range(3)] == [
            (1, [1]),
            (2, "cannot begin 2"),
            (3, "skipped: step 2 failed"),
        ]

    driven(LateRunner(broken_begins={2}), scenario)


def test_a_step_that_breaks_takes_those_behind_it_along_until_the_next_epoch():
    async def scenario(it):
        it.submit(1, 2)
        await it.begun(2)
        it.runner.steps[1].computed.set()
        assert await it.result() == (1, "broken 1")
        it.runner.steps[2].computed.set()
        assert await it.result() == (2, "skipped: step 1 failed")
        await it.thread.begin(2)
        it.submit(3, epoch=2)
        await it.begun(3)
        it.runner.steps[3].computed.set()
        assert await it.result() == (3, [3])
        assert it.runner.finished == [1, 3]

    driven(LateRunner(broken_finishes={1}), scenario)


def test_a_step_that_cannot_begin_because_an_earlier_one_broke_is_skipped():
    async def scenario(it):
        it.submit(1, 2)
        await it.begun(1)
        it.runner.steps[1].computed.set()
        assert [await it.result() for _ in range(2)] == [(1, "broken 1"), (2, "skipped: step 1 failed")]

    driven(LateRunner(broken_begins={2}, broken_finishes={1}), scenario)


def test_a_newer_epoch_drops_the_steps_that_were_begun_without_waiting_for_them():
    async def scenario(it):
        it.submit(1, 2)
        await it.begun(2)
        await it.thread.begin(2)
        assert it.runner.resets == 2
        assert it.results.empty()
        it.runner.steps[1].computed.set()
        it.runner.steps[2].computed.set()
        it.submit(3, epoch=2)
        await it.begun(3)
        it.runner.steps[3].computed.set()
        assert await it.result() == (3, [3])
        assert it.runner.finished == [3]

    driven(LateRunner(), scenario)


def test_stopping_finishes_and_answers_the_steps_that_were_begun():
    async def scenario(it):
        it.submit(1, 2)
        await it.begun(2)
        stopping = asyncio.create_task(it.thread.stop(TIMEOUT_S))
        await asyncio.sleep(0.01)
        for step in (1, 2):
            it.runner.steps[step].computed.set()
        assert await stopping
        assert [await it.result() for _ in range(2)] == [(1, [1]), (2, [2])]

    driven(LateRunner(), scenario)


class WholeRunner(WholeStepRunner):
    layers_done = 0

    def __init__(self, order):
        self.steps = {}
        self.order = order

    def run(self, plan):
        self.order.append(("run", plan.step))
        return StepOutput()

    def reset(self):
        pass


def test_a_step_that_is_over_when_it_has_begun_is_answered_before_the_next_begins():
    order = []

    async def scenario(it):
        call = it.thread._call_on_loop

        def noted(function, *args):
            order.append(("answer", args[1].step))
            call(function, *args)

        it.thread._call_on_loop = noted
        it.submit(1, 2, 3)
        for _ in range(3):
            await it.result()
        assert order == [(what, step) for step in (1, 2, 3) for what in ("run", "answer")]
        assert it.thread._waiter is None

    driven(WholeRunner(order), scenario)
