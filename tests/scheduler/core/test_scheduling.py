"""The scheduling rule: budgets, order, prefix hits, preemption, ends. One behaviour each."""

import msgspec
import pytest

from services.scheduler.core.events import Released
from services.scheduler.core.plan import StepResult
from services.scheduler.core.scheduler import CoreConfig
from services.scheduler.core.worker_group import Pace
from shared.clock import NS_PER_MS
from shared.outcome import AbortCause, FinishReason
from shared.sampling import Want
from tests.builders.core_driver import CoreDriver, submission

BLOCK = 4


def driver(*, num_blocks: int = 64, groups: int = 1, max_in_flight: int = 1, **config: object) -> CoreDriver:
    made = CoreDriver(CoreConfig(**{"max_model_len": 256, **config}), max_in_flight=max_in_flight)
    for i in range(groups):
        made.add_group(f"g{i}", num_blocks=num_blocks, block_size=BLOCK)
    return made


def refusal(one: CoreDriver, key: object) -> str:
    return one.released[key].refusal.name


def test_a_prompt_is_computed_in_one_step_where_the_budget_allows():
    d = driver()
    d.submit(submission("a", range(20)))
    plan = d.schedule()
    assert list(plan.counts) == [20] and list(plan.samples) == [1]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget():
    d = driver(max_num_batched_tokens=8)
    d.submit(submission("a", range(20), max_tokens=1))
    counts = []
    while (plan := d.schedule()) is not None:
        counts.append((list(plan.counts), list(plan.samples)))
        d.deliver()
    assert counts == [([8], [0]), ([8], [0]), ([4], [1])]
    assert d.answer("a") == d.expected("a")


def test_the_long_prefill_threshold_bounds_one_prompt_per_step():
    d = driver(long_prefill_token_threshold=4, max_num_batched_tokens=64)
    d.submit(submission("a", range(20)))
    d.submit(submission("b", range(30, 40)))
    assert list(d.schedule().counts) == [4, 4]


def test_a_long_prompt_never_starves_a_decode():
    d = driver(max_num_batched_tokens=8, max_num_seqs=4)
    d.submit(submission("short", range(4), max_tokens=30))
    d.schedule()
    d.deliver()
    d.submit(submission("long", range(100, 200), max_tokens=1))
    for _ in range(10):
        before = len(d.answer("short"))
        plan = d.schedule()
        d.deliver()
        assert len(d.answer("short")) == before + 1
        assert plan.num_tokens <= 8


def test_no_step_exceeds_the_budget_or_the_slots():
    d = driver(max_num_batched_tokens=16, max_num_seqs=3, max_in_flight=2)
    for i in range(10):
        d.submit(submission(i, range(i, i + 11), max_tokens=9))
    d.run()
    assert all(plan.num_tokens <= 16 and len(plan.slots) <= 3 for plan in d.plans)
    d.assert_answers()


def test_requests_that_arrive_together_share_their_prefix_at_once():
    d = driver()
    for i in range(4):
        d.submit(submission(i, [*range(16), 100 + i]))
    plan = d.schedule()
    assert list(plan.counts) == [17, 1, 1, 1]
    d.run()
    assert [d.released[i].cached_tokens for i in range(4)] == [0, 16, 16, 16]
    d.assert_answers()


def test_a_fully_cached_prompt_still_computes_its_last_token():
    d = driver()
    d.submit(submission("a", range(16), max_tokens=1))
    d.run()
    d.submit(submission("b", range(16), max_tokens=1))
    plan = d.schedule()
    assert list(plan.counts) == [4] and plan.admissions[0].computed == 12
    d.run()
    assert d.answer("b") == d.expected("b")


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation():
    d = driver()
    d.submit(submission("a", range(10), max_tokens=7))
    d.run()
    d.submit(submission("b", [*range(10), *d.answer("a"), 1, 2], max_tokens=1))
    d.run()
    assert d.released["b"].cached_tokens == 16


def test_samples_of_one_prompt_share_its_blocks():
    d = driver()
    d.submit(submission("a", range(16), n=3))
    plan = d.schedule()
    tables = [admission.tables[0][1] for admission in plan.admissions]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    d.run()
    assert len({tuple(d.answer("a", i)) for i in range(3)}) == 3
    d.assert_answers()


def test_samples_share_their_prompt_even_without_prefix_caching():
    d = driver(enable_prefix_caching=False)
    d.submit(submission("a", range(16), n=2))
    assert list(d.schedule().counts) == [16, 4]
    d.run()
    d.submit(submission("b", range(16)))
    assert list(d.schedule().counts) == [16]


@pytest.mark.parametrize("change", [{"salt": b"other"}, {"deterministic": True}])
def test_a_prefix_is_not_shared_across_tenants_or_exactness(change: dict):
    d = driver()
    d.submit(submission("a", range(16)))
    d.submit(submission("b", range(16), **change))
    assert list(d.schedule().counts) == [16, 16]


def test_a_step_with_an_exact_row_is_exact():
    d = driver()
    d.submit(submission("a", range(5)))
    assert not d.schedule().exact
    d.submit(submission("b", range(5), deterministic=True))
    d.deliver()
    assert d.schedule().exact


def test_eviction_takes_the_leaves_of_the_least_recent_prefix_first():
    d = driver(num_blocks=10)
    d.submit(submission("old", [*range(16), 1], max_tokens=1))
    d.run()
    d.submit(submission("big", range(100, 131), max_tokens=1))
    d.run()
    d.submit(submission("again", [*range(16), 2], max_tokens=1))
    d.run()
    assert 0 < d.released["again"].cached_tokens < 16


def test_the_last_arrival_is_preempted_and_everybody_finishes():
    d = driver(num_blocks=8, max_in_flight=2)
    for i in range(3):
        d.submit(submission(i, range(i * 10, i * 10 + 8), max_tokens=16))
    d.run()
    assert d.released[0].durations.preemptions == 0
    assert sum(d.released[i].durations.preemptions for i in (1, 2)) > 0
    d.assert_answers()
    d.assert_idle()


def test_four_times_oversubscribed_everything_completes_as_in_a_roomy_run():
    d = driver(num_blocks=16, max_in_flight=2, max_num_seqs=16)
    for i in range(16):
        d.submit(submission(i, range(i, i + 8), max_tokens=9))
    d.run()
    d.assert_answers()
    d.assert_idle()


def test_a_request_that_can_never_fit_is_refused_by_name():
    d = driver(num_blocks=4)
    d.submit(submission("pool", range(10), max_tokens=10))
    d.submit(submission("model", range(300), max_tokens=1))
    d.submit(submission("fits", range(10), max_tokens=7))
    assert refusal(d, "pool") == "exceeds_kv_pool"
    assert refusal(d, "model") == "prompt_too_long"
    d.run()
    assert d.answer("fits") == d.expected("fits")


def test_unlimited_output_ends_with_the_models_length():
    d = driver(max_model_len=40)
    d.submit(submission("a", range(10), max_tokens=0))
    d.run()
    assert len(d.answer("a")) == 30 and d.ends["a", 0].reason is FinishReason.LENGTH


def test_a_full_queue_refuses_with_a_retry_delay():
    d = driver(max_num_queued_reqs=2)
    for i in range(3):
        d.submit(submission(i, range(5)))
    assert refusal(d, 2) == "queue_full" and d.released[2].refusal.retry_after_ms >= 100


def test_without_a_worker_a_request_is_refused_at_once():
    d = driver(groups=0)
    d.submit(submission("a", range(5)))
    assert refusal(d, "a") == "no_worker"


def test_a_stop_token_ends_a_sample_and_min_tokens_delays_it():
    d = driver()
    free = submission("free", range(7), max_tokens=12)
    d.submit(free)
    d.run()
    stop = d.answer("free")[0]
    d.submit(submission("stopped", range(7), max_tokens=12, stop=[stop]))
    d.submit(submission("delayed", range(7), max_tokens=12, stop=[stop], min_tokens=1))
    d.run()
    assert d.answer("stopped") == [stop] and d.ends["stopped", 0].stop_token_id == stop
    assert len(d.answer("delayed")) > 1


def test_an_abort_frees_blocks_at_once_and_is_idempotent():
    d = driver(max_in_flight=2)
    d.submit(submission("a", range(20), max_tokens=50))
    d.schedule()
    d.schedule()
    for _ in range(3):
        d.abort("a")
    d.assert_idle()
    assert d.ends["a", 0].reason is FinishReason.ABORT and refusal(d, "a") == "cancelled"
    d.deliver()
    d.deliver()
    assert d.answer("a") == []


def test_a_stop_string_ends_one_sample_well_and_the_others_go_on():
    d = driver()
    d.submit(submission("a", range(8), n=2, max_tokens=6))
    d.schedule()
    d.deliver()
    d.abort("a", 0, AbortCause.STOP_STRING)
    d.run()
    assert d.ends["a", 0].reason is FinishReason.STOP and d.released["a"].refusal is None
    assert d.answer("a", 1) == d.expected("a", 1)


def test_a_deadline_ends_a_request_wherever_it_stands():
    d = driver(max_num_seqs=1)
    d.submit(submission("runs", range(8), max_tokens=200, deadline_ns=5_000_000))
    d.submit(submission("waits", range(8), max_tokens=200, deadline_ns=6_000_000))
    for _ in range(10):
        d.now_ns += 1_000_000
        d.schedule()
        d.deliver()
    assert {refusal(d, key) for key in ("runs", "waits")} == {"deadline_exceeded"}
    d.assert_idle()


def test_a_deadline_that_cannot_be_met_is_refused_early():
    d = driver(max_num_seqs=1)
    d.submit(submission("first", range(100), max_tokens=50))
    for _ in range(5):
        d.schedule()
        d.deliver()
    late = submission("late", range(5), max_tokens=100, deadline_ns=d.now_ns + 3_000_000)
    d.submit(late)
    assert refusal(d, "late") == "deadline_unreachable"
    d.submit(submission("fine", range(5), max_tokens=100, deadline_ns=d.now_ns + 10**12))
    d.run()
    assert d.answer("fine") == d.expected("fine")


def test_priority_goes_first_and_waiting_outweighs_it_in_time():
    d = driver(policy="priority", max_num_seqs=1)
    d.submit(submission("busy", range(4), max_tokens=2))
    d.schedule()
    d.submit(submission("low", range(4), max_tokens=1, priority=5))
    d.submit(submission("high", range(4), max_tokens=1, priority=0))
    d.deliver()
    d.run()
    order = list(d.released)
    assert order.index("high") < order.index("low")
    d.submit(submission("busy2", range(4), max_tokens=2))
    d.schedule()
    d.submit(submission("old", range(4), max_tokens=1, priority=5))
    d.now_ns += 51 * 10**9
    d.submit(submission("new", range(4), max_tokens=1, priority=0))
    d.run()
    order = list(d.released)
    assert order.index("old") < order.index("new")


def test_a_request_goes_where_its_prefix_is_warm():
    d = driver(groups=2)
    d.submit(submission("a", range(32), max_tokens=1))
    d.run()
    home = d.core.groups["g0"].pool.num_available, d.core.groups["g0"].load().kv_blocks_cached
    warm = "g0" if home[1] else "g1"
    for i in range(3):
        d.submit(submission(i, [*range(32), 50 + i], max_tokens=1))
        assert d.core.requests[i].samples[0].group_id == warm


def test_cold_requests_spread_over_the_groups():
    d = driver(groups=2)
    for i in range(8):
        d.submit(submission(i, range(i * 20, i * 20 + 20)))
    assert {len(group.waiting) for group in d.core.groups.values()} == {4}


def test_an_idle_group_takes_over_from_one_that_is_stuck():
    d = driver(max_num_seqs=1)
    for i in range(4):
        d.submit(submission(i, range(8), max_tokens=30))
    d.schedule("g0")
    d.add_group("g1", num_blocks=64, block_size=BLOCK)
    assert d.schedule("g1") is not None
    d.run()
    d.assert_answers()


def test_a_lost_worker_costs_nothing_where_another_stands_by():
    d = driver(groups=2, max_in_flight=2)
    for i in range(6):
        d.submit(submission(i, range(i, i + 9), max_tokens=12))
    for _ in range(4):
        for group in ("g0", "g1"):
            d.schedule(group)
            d.deliver(group)
    d.lose_group("g0")
    d.run()
    d.assert_answers()
    assert all(released.refusal is None for released in d.released.values())
    assert any("worker_lost" in released.durations.queue_reason_ns for released in d.released.values())


def test_what_was_cached_is_told_of_a_request_that_changed_its_queue():
    d = driver(max_num_seqs=1)
    d.submit(submission("warm", range(20), max_tokens=1))
    d.run()
    for start in (100, 200):
        d.submit(submission(start, range(start, start + 60), max_tokens=4))
        d.schedule()
    d.add_group("g1", block_size=BLOCK)
    d.submit(submission("b", range(20), max_tokens=4))
    assert len(d.core.groups["g1"].waiting) == 1
    d.lose_group("g1")
    d.run()
    assert d.released["b"].cached_tokens == 16


def test_what_was_cached_is_told_where_the_first_sample_never_ran():
    d = driver(max_num_seqs=1)
    d.submit(submission("warm", range(20), max_tokens=1))
    d.run()
    d.submit(submission("running", range(100, 110), max_tokens=4))
    d.schedule()
    d.submit(submission("b", range(20), n=2))
    d.abort("b", 0)
    d.run()
    assert d.released["b"].cached_tokens == 16


def test_what_was_cached_stays_what_it_was_through_a_preemption():
    d = driver(num_blocks=14)
    d.submit(submission("warm", range(8), max_tokens=1))
    d.run()
    for key in ("a", "b"):
        d.submit(submission(key, [*range(8), *range(20, 30)], max_tokens=24))
    d.run()
    assert d.released["b"].durations.preemptions > 0
    assert [d.released[key].cached_tokens for key in ("a", "b")] == [8, 16]


def test_the_account_opens_the_queue_again_after_a_preemption():
    d = driver(num_blocks=14)
    for key, first in (("a", 0), ("b", 40)):
        d.submit(submission(key, range(first, first + 10), max_tokens=40))
    d.run()
    durations = d.released["b"].durations
    phases = [segment.phase for segment in durations.segments]
    assert phases == ["queue", "prefill", "decode"] * (1 + durations.preemptions)
    assert durations.preemptions >= 1
    assert durations.segments[3].reason_ns.keys() == {"blocks"}


def test_each_stretch_counts_its_own_tokens_those_computed_again_among_them():
    d = driver(num_blocks=14)
    for key, first in (("a", 0), ("b", 40)):
        d.submit(submission(key, range(first, first + 10), max_tokens=40))
    d.run()
    segments = d.released["b"].durations.segments
    prefills = [segment for segment in segments if segment.phase == "prefill"]
    decodes = [segment for segment in segments if segment.phase == "decode"]
    assert (prefills[0].computed_tokens, prefills[0].cached_tokens, prefills[0].chunks) == (10, 0, 1)
    known = 10
    for prefill, decode in zip(prefills, decodes, strict=True):
        assert prefill.computed_tokens + prefill.cached_tokens == known
        assert prefill.sampled_tokens == 1
        assert decode.computed_tokens == decode.chunks
        known += prefill.sampled_tokens + decode.sampled_tokens
    assert known == 50
    assert [decode.preemptions for decode in decodes] == [1] * (len(decodes) - 1) + [0]


def test_a_segment_knows_the_steps_that_its_group_finished_meanwhile():
    d = driver()
    for key in ("a", "b"):
        d.submit(submission(key, range(10), max_tokens=6))
    d.run()
    queue, prefill, decode = d.released["a"].durations.segments
    assert (queue.steps, prefill.steps, prefill.rows) == (0, 1, 2)
    assert decode.rows == 2 * decode.steps
    assert decode.steps >= 5
    assert decode.device_ns == decode.steps * 1_000_000


def test_the_last_worker_lost_ends_requests_with_a_retryable_error():
    d = driver()
    d.submit(submission("a", range(9), max_tokens=12))
    d.schedule()
    d.lose_group("g0")
    released = d.released["a"]
    assert isinstance(released, Released)
    assert released.refusal.name == "worker_lost" and released.refusal.kind.may_retry
    assert d.ends["a", 0].reason is FinishReason.ERROR


def test_a_failed_step_is_tried_again_once():
    d = driver(max_in_flight=2)
    d.submit(submission("a", range(9), max_tokens=6))
    d.schedule()
    d.deliver(error="boom")
    d.run()
    assert d.answer("a") == d.expected("a")
    d.submit(submission("b", range(30, 39), max_tokens=6))
    for _ in range(2):
        d.schedule()
        d.deliver(error="boom")
    assert refusal(d, "b") == "step_failed" and d.ends["b", 0].reason is FinishReason.ERROR


def test_prompt_logprobs_compute_the_whole_prompt():
    d = driver()
    d.submit(submission("a", range(16), max_tokens=1))
    d.run()
    d.submit(submission("b", range(16), max_tokens=1, want=Want(prompt_logprobs=0)))
    plan = d.schedule()
    assert list(plan.counts) == [16] and plan.admissions[0].prompt_logprobs == 0


def test_a_live_key_cannot_be_used_twice():
    d = driver()
    d.submit(submission("a", range(5)))
    with pytest.raises(ValueError, match="live"):
        d.submit(submission("a", range(5)))


def test_a_result_out_of_order_is_an_error():
    d = driver(max_in_flight=2)
    d.submit(submission("a", range(5)))
    d.schedule()
    plan = d.schedule()
    with pytest.raises(ValueError, match="oldest"):
        d.core.apply("g0", StepResult(step=plan.step, tokens=[1]), 0)


def test_waiting_time_is_told_by_its_reason():
    d = driver(max_num_seqs=1)
    d.submit(submission("a", range(8), max_tokens=20))
    d.submit(submission("b", range(8), max_tokens=1))
    d.run()
    reasons = d.released["b"].durations.queue_reason_ns
    assert max(reasons, key=reasons.get) == "max_num_seqs"


def waits(policy: str) -> tuple[dict[str, int], dict[str, int]]:
    """One slot, taken for 20 ms: `b` waits for it from the start, `c` comes 5 ms later and is more urgent."""
    d = driver(max_num_seqs=1, policy=policy)
    d.submit(submission("a", range(8), max_tokens=20))
    d.schedule()
    d.submit(submission("b", range(8), max_tokens=1))
    for _ in range(5):
        d.now_ns += NS_PER_MS
        d.deliver()
        d.schedule()
    d.submit(submission("c", range(8), max_tokens=10, priority=-50))
    d.run()
    return d.released["b"].durations.queue_reason_ns, d.released["c"].durations.queue_reason_ns


def test_a_request_behind_one_that_overtook_it_waits_for_its_priority():
    b, c = waits("priority")
    # Until the next step, then for the slot, then behind c until c has it, then for c to leave it.
    assert b == {"step": NS_PER_MS, "max_num_seqs": 16 * NS_PER_MS, "priority": 14 * NS_PER_MS}
    assert c == {"max_num_seqs": 16 * NS_PER_MS}


def test_first_come_first_served_is_no_matter_of_priority():
    b, c = waits("fcfs")
    assert "priority" not in b | c


def test_a_budget_smaller_than_the_slots_bounds_the_sequences():
    d = driver(max_num_batched_tokens=4, max_num_seqs=16)
    for i in range(9):
        d.submit(submission(i, range(i, i + 7), max_tokens=5))
    d.run()
    assert max(plan.num_tokens for plan in d.plans) == 4
    d.assert_answers()


def test_prompt_logprobs_survive_a_preemption_behind_the_last_chunk():
    d = driver(num_blocks=6, max_in_flight=2)
    for i in range(3):
        d.submit(submission(i, range(i * 10, i * 10 + 8), max_tokens=12, want=Want(prompt_logprobs=0)))
    d.run()
    assert sum(d.released[i].durations.preemptions for i in range(3)) > 0
    d.assert_answers()


def test_the_last_token_of_a_preempted_sample_brings_the_prompt_logprobs_along():
    d = driver(num_blocks=6, max_in_flight=2)
    d.submit(submission("one", range(7), max_tokens=10))
    d.submit(submission("two", range(10, 17), max_tokens=10))
    d.schedule()
    d.deliver()
    d.submit(submission("asks", range(20, 23), max_tokens=1, want=Want(prompt_logprobs=0)))
    d.schedule()
    d.schedule()  # both decodes want a block: the newcomer, still in flight, is preempted
    assert d.core.requests["asks"].ledger.preemptions == 1
    d.deliver()
    assert d.answer("asks") == d.expected("asks") and len(d.prompt_logprobs["asks"]) == 2
    d.run()
    d.assert_answers()


def test_estimates_come_from_the_best_of_late_and_from_steps_of_their_own_kind():
    pace = Pace()
    pace.learn(1000, 1, 1_000_000_000)
    for _ in range(64):
        pace.learn(64, 64, 400_000_000)
    pace.learn(1, 1, 20_000_000)
    assert pace.estimate_ns(1000, 0) == pytest.approx(1e9)
    for _ in range(3000):
        pace.learn(1, 1, 20_000_000)
    assert pace.estimate_ns(1000, 0) == pytest.approx(1e9)
    assert pace.estimate_ns(0, 100) == pytest.approx(2e9, rel=0.01)


def test_a_prompt_goes_on_while_decodes_claim_the_whole_budget():
    d = driver(max_num_batched_tokens=4, max_num_seqs=4)
    for i in range(3):
        d.submit(submission(i, [i], max_tokens=200))
    while any(len(d.answer(i)) < 2 for i in range(3)):
        d.schedule()
        d.deliver()
    d.submit(submission("prompt", range(20, 40), max_tokens=1))
    for _ in range(25):
        d.schedule()
        d.deliver()
    assert d.answer("prompt") == d.expected("prompt")


def test_a_plan_carries_no_more_known_tokens_than_a_message_holds(monkeypatch):
    monkeypatch.setattr("services.scheduler.core.step.MOST_ADMITTED_TOKENS", 50)
    d = driver()
    for key, length in (("long", 60), ("a", 20), ("b", 20), ("c", 20)):
        d.submit(submission(key, range(length), max_tokens=1))
    rows = []
    while (plan := d.schedule()) is not None:
        rows.append(len(plan.admissions))
        d.deliver()
    assert rows == [1, 2, 1]
    assert all(d.answer(key) == d.expected(key) for key in ("long", "a", "b", "c"))


def test_a_deadline_is_judged_by_what_goes_before_it():
    d = driver(policy="priority", max_num_seqs=1)
    d.submit(submission("first", range(100), max_tokens=50))
    for _ in range(5):
        d.schedule()
        d.deliver()
    for i in range(10):
        d.submit(submission(f"later{i}", range(200), max_tokens=2, priority=10))
    urgent = {"max_tokens": 2, "deadline_ns": d.now_ns + 4_000_000}
    d.submit(submission("urgent", range(5), priority=-5, **urgent))
    d.submit(submission("patient", range(5), priority=20, **urgent))
    assert refusal(d, "patient") == "deadline_unreachable"
    assert "urgent" not in d.released


def test_a_stop_string_may_end_what_a_deadline_would_not_allow():
    d = driver(max_num_seqs=1)
    d.submit(submission("first", range(100), max_tokens=50))
    for _ in range(5):
        d.schedule()
        d.deliver()
    for key, stops_on_text in (("certain", False), ("perhaps", True)):
        made = submission(key, range(5), max_tokens=100, deadline_ns=d.now_ns + 3_000_000)
        stopping = msgspec.structs.replace(made.stopping, stop_token_ids=frozenset(), stops_on_text=stops_on_text)
        d.submit(msgspec.structs.replace(made, stopping=stopping))
    assert refusal(d, "certain") == "deadline_unreachable" and "perhaps" not in d.released
