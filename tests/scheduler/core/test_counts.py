"""What the core counts: each number moves for what it counts, and for nothing else."""

from services.scheduler.core.counts import Counts, Migration, PreemptReason
from services.scheduler.core.phases import Phase, WaitReason
from services.scheduler.core.scheduler import CoreConfig
from shared.clock import NS_PER_MS
from shared.outcome import AbortCause
from shared.sampling import Want
from tests.builders.core_driver import CoreDriver, submission


def driver(*, num_blocks: int = 64, groups: int = 1, max_in_flight: int = 1, **config: object) -> CoreDriver:
    made = CoreDriver(CoreConfig(**{"max_model_len": 256, **config}), max_in_flight=max_in_flight)
    for i in range(groups):
        made.add_group(f"g{i}", num_blocks=num_blocks)
    return made


def test_an_undisturbed_request_counts_its_lookup_alone():
    d = driver()
    d.submit(submission("a", range(9)))
    d.run()
    assert d.core.counts == Counts(prefix_queries=9)


def test_prefix_tokens_are_counted_once_for_each_sample_that_looks_them_up():
    d = driver()
    d.submit(submission("a", range(9), max_tokens=1))
    d.run()
    d.submit(submission("b", [*range(8), 40], n=2, max_tokens=1))
    d.run()
    assert (d.core.counts.prefix_queries, d.core.counts.prefix_hits) == (9 + 2 * 9, 2 * 8)


def test_no_lookup_is_counted_where_the_cache_is_not_asked():
    d = driver(enable_prefix_caching=False)
    d.submit(submission("a", range(9), n=2))
    d.run()
    whole = driver()
    whole.submit(submission("a", range(9), want=Want(prompt_logprobs=0)))
    whole.run()
    assert d.core.counts.prefix_queries == whole.core.counts.prefix_queries == 0


def test_a_preemption_is_counted_by_its_reason_and_its_return_is_no_lookup():
    d = driver(num_blocks=8, max_in_flight=2)
    for i in range(3):
        d.submit(submission(i, range(i * 10, i * 10 + 8), max_tokens=16))
    d.run()
    counts = d.core.counts
    assert counts.preemptions[PreemptReason.BLOCKS] == sum(d.released[i].durations.preemptions for i in range(3)) > 0
    assert counts.preemptions[PreemptReason.STEP_FAILED] == counts.preemptions[PreemptReason.WORKER_LOST] == 0
    assert counts.prefix_queries == 3 * 8


def test_a_failed_step_preempts_what_ran():
    d = driver()
    d.submit(submission("a", range(9), n=2))
    d.schedule()
    d.deliver(error="boom")
    assert d.core.counts.preemptions[PreemptReason.STEP_FAILED] == 2


def test_an_abort_is_counted_by_the_phase_it_found_and_once():
    d = driver(max_num_seqs=2)
    for key in ("decodes", "computes", "waits"):
        d.submit(submission(key, range(9), max_tokens=50))
        if key == "decodes":
            d.schedule()
            d.deliver()
    d.schedule()
    for key in ("decodes", "computes", "waits", "waits"):
        d.abort(key)
    assert d.core.counts.aborts == {Phase.QUEUE: 1, Phase.PREFILL: 1, Phase.DECODE: 1}


def test_a_stop_string_is_no_abort_and_a_deadline_is():
    d = driver()
    d.submit(submission("stops", range(9), max_tokens=50))
    d.submit(submission("late", range(9), max_tokens=50, deadline_ns=5 * NS_PER_MS))
    d.schedule()
    d.deliver()
    d.abort("stops", 0, AbortCause.STOP_STRING)
    assert sum(d.core.counts.aborts.values()) == 0
    d.now_ns = 6 * NS_PER_MS
    d.schedule()
    assert d.core.counts.aborts[Phase.DECODE] == 1


def test_the_device_lets_go_of_an_aborted_sample_with_the_last_step_that_computes_for_it():
    d = driver(max_in_flight=2)
    d.submit(submission("a", range(9), max_tokens=50))
    d.submit(submission("waits", range(9), max_tokens=50))
    d.schedule()
    d.schedule()
    d.now_ns = 2 * NS_PER_MS
    d.abort("a")
    assert d.core.counts.drain_freed_ns() == []
    d.deliver()
    assert d.core.counts.drain_freed_ns() == []
    d.now_ns = 7 * NS_PER_MS
    d.deliver()
    assert d.core.counts.drain_freed_ns() == [5 * NS_PER_MS]
    d.abort("waits")
    assert d.core.counts.drain_freed_ns() == [0]


def test_a_step_that_fails_or_is_lost_lets_go_too():
    d = driver(groups=2)
    for i in range(2):
        d.submit(submission(i, range(i * 20, i * 20 + 9), max_tokens=50))
    d.schedule("g0")
    d.schedule("g1")
    d.abort(0)
    d.abort(1)
    d.now_ns = NS_PER_MS
    d.deliver("g0", error="boom")
    d.lose_group("g1")
    assert d.core.counts.drain_freed_ns() == [NS_PER_MS, NS_PER_MS]


def test_a_lost_worker_moves_its_samples_or_fails_them():
    d = driver(groups=2)
    for i in range(4):
        d.submit(submission(i, range(i * 20, i * 20 + 9), max_tokens=20))
    d.schedule("g0")
    stood = len(d.core.groups["g0"].running) + len(d.core.groups["g0"].waiting)
    d.lose_group("g0")
    assert d.core.counts.migrations == {Migration.MOVED: stood, Migration.FAILED: 0}
    assert d.core.counts.preemptions[PreemptReason.WORKER_LOST] == stood
    d.lose_group("g1")
    assert d.core.counts.migrations == {Migration.MOVED: stood, Migration.FAILED: 4}


def test_who_waits_is_told_by_reason():
    d = driver(max_num_seqs=1, policy="priority", max_in_flight=4)
    for key, priority in (("a", 0), ("b", 0), ("c", -50)):
        d.submit(submission(key, range(8), max_tokens=20, priority=priority))
        d.schedule()
    waiting = d.core.groups["g0"].waiting_by_reason()
    assert waiting == {WaitReason.MAX_NUM_SEQS: 1, WaitReason.PRIORITY: 1}
