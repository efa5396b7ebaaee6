"""Stop strings are found wherever the borders of tokens lie."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.text.stops import Found, StopMatcher, StopStrings


def search(stops, pieces):
    """(text sent, stop found) for text that arrives in pieces."""
    matcher, sent = StopMatcher(StopStrings(stops)), ""
    for piece in pieces:
        found = matcher.push(piece)
        sent += found.text
        if found.stop is not None:
            return sent, found.stop
    return sent + matcher.flush(), None


def reference(stops, text):
    """The first match to be complete; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4),
    text=st.text(alphabet="abcd", max_size=30),
    seed=st.integers(0, 2**16),
)
def test_the_result_is_the_reference_s_however_the_text_is_cut(stops, text, seed):
    rng, pieces, rest = random.Random(seed), [], text
    while rest:
        size = rng.randrange(0, 5)
        pieces.append(rest[:size])
        rest = rest[size:]
    assert search(stops, pieces) == reference(stops, text)


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_cannot():
    matcher = StopMatcher(StopStrings(["STOP"]))
    assert matcher.push("go S") == Found("go ")
    assert matcher.push("TO") == Found("")
    assert matcher.push("RY") == Found("STORY")
    assert matcher.flush() == ""


def test_no_more_is_held_than_could_begin_a_match():
    matcher = StopMatcher(StopStrings(["aab"]))
    assert matcher.push("aaaa") == Found("aa")


def test_what_follows_a_match_is_dropped():
    assert search(["\n\n"], ["one\n", "\ntwo"]) == ("one", "\n\n")


def test_of_overlapping_stop_strings_the_first_to_end_wins():
    assert search(["bcd", "abcde"], ["abcde"]) == ("a", "bcd")
    assert search(["cd", "abcd"], ["xabcd"]) == ("x", "abcd")


def test_unicode_stop_strings_match_by_character():
    assert search(["世界"], ["你好", "世", "界!"]) == ("你好", "世界")


def test_held_text_is_returned_at_the_end():
    assert search(["STOP"], ["ends with STO"]) == ("ends with STO", None)


def test_an_empty_stop_string_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
