"""A request whose answer has a structure waits for its grammar, and for nobody else's."""

from services.scheduler.core.grammars import MOST_HELD, Forget, Grammars, Prepare
from services.scheduler.core.phases import WaitReason
from services.scheduler.core.plan import StepResult
from services.scheduler.core.scheduler import CoreConfig
from shared.clock import NS_PER_MS
from shared.structured import Structured
from tests.builders.core_driver import CoreDriver, submission


def driver(**settings):
    one = CoreDriver(CoreConfig(max_model_len=96, **settings))
    one.add_group("g0")
    return one


def structured(seed=7):
    return Structured("regex", str(seed))


def test_an_unprepared_request_is_never_planned_and_holds_up_nobody():
    d = driver()
    d.submit(submission("waits", [1, 2, 3], structured=structured()))
    d.submit(submission("plain", [4, 5, 6]))
    for _ in range(4):
        d.now_ns += NS_PER_MS
        d.schedule()
        d.deliver()
    assert d.answer("plain") and not d.answer("waits")
    assert d.core.groups["g0"].waiting_by_reason() == {WaitReason.GRAMMAR: 1}
    assert d.core.groups["g0"].load().requests_waiting == 1
    d.prepare()
    d.run()
    d.assert_answers()
    assert d.released["waits"].durations.queue_reason_ns["grammar"] == 4 * NS_PER_MS


def test_a_prepared_request_takes_its_place_before_those_that_came_later():
    d = driver(max_num_seqs=1)
    d.submit(submission("first", [1], structured=structured()))
    d.submit(submission("second", [2]))
    d.prepare()
    plan = d.schedule()
    assert plan is not None and plan.admissions[0].grammar == 1


def test_requests_of_one_grammar_share_it_and_it_is_forgotten_with_the_last():
    d = driver()
    d.submit(submission("a", [1], structured=structured(), n=3))
    d.submit(submission("b", [2], structured=structured()))
    d.prepare()
    assert not d.asked["g0"]
    plan = d.schedule()
    assert [admission.grammar for admission in plan.admissions] == [1] * 4
    d.run()
    assert d.core.groups["g0"].grammars.drain() == [Forget(1)]


def test_a_grammar_that_does_not_compile_ends_its_requests_and_no_other():
    d = driver()
    d.submit(submission("bad", [1], structured=structured(), n=2))
    d.submit(submission("good", [2], structured=structured(8), seed=8))
    d.prepare(error="too large")
    refusal = d.released["bad"].refusal
    assert (refusal.name, refusal.message, refusal.field) == (
        "invalid_argument",
        "structured.regex: too large",
        "structured.regex",
    )
    d.run()
    d.assert_answers()
    assert d.released["good"].refusal is None


def test_a_row_whose_grammar_gives_up_ends_without_that_token():
    d = driver()
    d.submit(submission("a", [1], structured=structured()))
    d.submit(submission("b", [2]))
    d.prepare()
    plan = d.schedule()
    result = d.devices["g0"].run(plan)
    d.flying["g0"].clear()
    d.core.apply("g0", StepResult(step=plan.step, tokens=result.tokens, grammar_errors={0: "too complex"}), d.now_ns)
    d.run()
    assert d.answer("a") == []
    released = d.released["a"]
    assert (released.refusal.name, released.refusal.message) == ("invalid_argument", "structured.regex: too complex")
    assert released.completion_tokens == 0
    assert d.answer("b") == d.expected("b")


def test_it_is_prepared_again_after_a_failed_step_and_on_another_worker():
    d = driver()
    d.add_group("g1")
    d.submit(submission("a", [1, 2], structured=structured()))
    name = d.core.requests["a"].samples[0].group_id
    d.prepare(name)
    d.schedule(name)
    d.deliver(name, error="made to fail")
    assert d.schedule(name) is None, "the worker has dropped it"
    d.prepare(name)
    assert d.schedule(name).admissions[0].grammar == 2
    d.deliver(name)
    d.lose_group(name)
    other = "g1" if name == "g0" else "g0"
    assert d.schedule(other) is None, "the other worker never had it"
    d.run()
    d.assert_answers()


def test_a_preempted_request_needs_no_second_preparation():
    d = driver()
    d.core.groups.clear()
    d.devices.clear()
    d.add_group("g0", num_blocks=6)
    for key in "ab":
        d.submit(submission(key, range(8), structured=structured(), max_tokens=12))
    d.prepare()
    d.run()
    d.assert_answers()
    assert sum(released.durations.preemptions for released in d.released.values())


def test_an_abort_while_it_is_prepared_lets_go_of_it():
    d = driver()
    d.submit(submission("a", [1], structured=structured()))
    grammar_id = d.core.groups["g0"].grammars.drain()[0].id
    d.abort("a")
    assert d.core.groups["g0"].grammars.drain() == [Forget(grammar_id)]
    d.core.prepared("g0", grammar_id, "", d.now_ns)
    d.assert_idle()


def test_only_so_many_are_held_at_once():
    grammars = Grammars()
    for number in range(MOST_HELD + 2):
        grammars.join(structured(number))
    assert len(grammars.drain()) == MOST_HELD
    grammars.leave(structured(0))
    assert grammars.drain() == [Forget(1), Prepare(MOST_HELD + 1, structured(MOST_HELD))]
    grammars.leave(structured(MOST_HELD + 1))
    assert grammars.drain() == [], "it was never asked for"
