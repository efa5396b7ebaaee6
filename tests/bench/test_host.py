"""The host-path bench at a small count: a scheduler and a worker in processes of their own around a pretend device."""

import json
import time

import numpy as np
import pytest

from ops.bench import host
from ops.bench.pretend_gpu import FLOORS_MS, PretendGpu, Step, floor_ns, pretend_gpu
from tests.builders.plans import make_admit, make_plan


def test_the_bench_measures_a_batch_through_grpc_and_writes_it_down(tmp_path, monkeypatch):
    output = tmp_path / "host.json"
    monkeypatch.setattr(
        "sys.argv", ["host", "--batches", "4", "--steps", "60", "--repeats", "1", "--output", str(output)]
    )
    assert host.main() == 0
    result = json.loads(output.read_text())
    assert result["machine"]["commit"]
    (figures,) = result["batches"]["4"]["runs"]
    assert result["batches"]["4"]["median"]["idle_share"] == figures["idle_share"]
    assert figures["steps"] >= 55
    assert 0 <= figures["idle_share"] < 0.5
    assert 0 < figures["bytes_down"]["most"] < 200
    assert 0 < figures["bytes_up"]["most"] < 200
    assert 0 < figures["scheduler_cpu_ms_per_step"] < 20
    assert 0 < figures["worker_cpu_ms_per_step"] < 20


def test_floors_are_those_of_goals_and_lines_between():
    assert {batch: floor_ns(batch) / 1e6 for batch in FLOORS_MS} == FLOORS_MS
    assert floor_ns(1) < floor_ns(8) < floor_ns(16)


def runner_with(step_ms) -> PretendGpu:
    runner = pretend_gpu(4, 64, lambda rows: int(step_ms * 1e6))
    runner.run(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])]))
    return runner


def test_a_device_that_is_given_its_next_step_in_time_is_never_idle():
    runner = runner_with(20)
    pending = runner.begin(make_plan(2, [(0, 1, True, ())]))
    behind = runner.begin(make_plan(3, [(0, 1, True, ())]))
    for each in (pending, behind):
        runner.finish(each)
    assert runner.steps[2].idle_ns == 0
    assert runner.steps[2].started_ns == runner.steps[1].done_ns


def test_the_time_that_a_device_waits_for_its_next_step_is_idle():
    runner = runner_with(1)
    time.sleep(0.005)
    runner.run(make_plan(2, [(0, 1, True, ())]))
    assert runner.steps[1].idle_ns >= 4e6


def test_a_summary_of_steps_that_are_not_the_whole_batchs_is_refused():
    step = Step(rows=3, decodes=True, begun_ns=0, started_ns=1, done_ns=2, idle_ns=0)
    with pytest.raises(RuntimeError, match="1 of 1 steps were no decode steps of all 4 rows"):
        host.summarize(4, host.Window(0, 9, 0.1, 0.1, 0.0), [step], {"down": [], "up": []})


def test_the_pretend_device_writes_its_tokens_where_a_worker_would():
    runner = runner_with(0)
    assert runner.slots.tokens[0, :3].tolist() == [4, 5, 7]
    assert np.array_equal(runner.run(make_plan(2, ())).tokens, [])
