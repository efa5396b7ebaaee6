"""Placement as a function."""

from hypothesis import given
from hypothesis import strategies as st

from services.router.placement import Candidate, choose, cost


def one(name="a", **fields):
    return Candidate(name=name, **fields)


def chosen(candidates, prompt_tokens=1000):
    choice = choose(candidates, prompt_tokens)
    return None if choice is None else candidates[choice.index].name


def test_nobody_is_chosen_from_none():
    assert chosen([]) is None


def test_the_warmest_of_equally_busy_ones_is_chosen():
    assert chosen([one("a", overlap_tokens=16), one("b", overlap_tokens=512), one("c")]) == "b"


def test_the_least_busy_of_equally_warm_ones_is_chosen():
    assert chosen([one("a", requests_waiting=2), one("b", requests_waiting=1), one("c", unseen=2)]) == "b"


def test_a_long_queue_outweighs_a_warm_prefix():
    assert chosen([one("warm", overlap_tokens=900, requests_waiting=20), one("idle")]) == "idle"
    assert chosen([one("warm", overlap_tokens=900, requests_waiting=1), one("idle")]) == "warm"


def test_a_full_pool_is_avoided_while_another_has_room():
    assert chosen([one("full", overlap_tokens=500, free_tokens=100), one("roomy", free_tokens=5000)]) == "roomy"
    assert chosen([one("full", overlap_tokens=500, free_tokens=100)]) == "full"


def test_ties_go_to_the_first():
    assert chosen([one("a"), one("b")]) == "a"


candidates = st.builds(
    Candidate,
    name=st.just("x"),
    overlap_tokens=st.integers(0, 4000),
    requests_running=st.integers(0, 100),
    requests_waiting=st.integers(0, 100),
    unseen=st.integers(0, 100),
    free_tokens=st.integers(0, 10_000),
)


@given(st.lists(candidates, min_size=1, max_size=6), st.integers(1, 8000))
def test_the_choice_is_never_dearer_than_another(found, prompt_tokens):
    choice = choose(found, prompt_tokens)
    assert choice is not None
    assert choice.costs[choice.index] == min(choice.costs) == min(cost(one, prompt_tokens) for one in found)
