"""An answer as it grows, without a wire: whatever the order of tokens and reads, the same events in sum."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.answer import Answer
from services.router.fleet.values import Durations, Release
from services.router.request import Delta, Finished, GenerateOptions
from shared.outcome import AbortCause, FinishReason, Refusal
from shared.sampling import Sampling, Stopping, TokenLogprobs, Want
from shared.text.detokenizer import TokenTexts
from shared.text.stops import StopStrings
from tests.builders.tokenizers import KINDS

BACKEND = KINDS["byte_level"]()
TEXTS = TokenTexts(BACKEND)
PROMPT = [10, 11, 12]


class Ticket:
    def __init__(self):
        self.aborts = []
        self.forgotten = False

    def abort(self, index, cause):
        self.aborts.append((index, cause))

    def forget(self):
        self.forgotten = True


def answer(*, prompt=PROMPT, n=1, stop=(), max_unread_bytes=1 << 20, want=None, **stopping):
    options = GenerateOptions(
        request_id="r",
        model="m",
        sampling=Sampling(seed=1),
        stopping=Stopping(**stopping),
        want=want or Want(),
        n=n,
        stop=stop,
    )
    made = Answer(options, prompt, TEXTS, StopStrings(stop) if stop else None, max_unread_bytes, lambda: 7)
    made.attach(Ticket())
    return made, made._ticket


def encode(text):
    return BACKEND.encode(text, add_special_tokens=False).ids


def said(events, index=0):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


TEXT = "the quick brown STOP 你好🙂 fox"


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 3),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.booleans()), max_size=60),
    stop=st.sampled_from([(), ("STOP",), ("你", "zz"), ("never",)]),
)
def test_however_tokens_and_reads_interleave_the_sum_is_the_same(n, steps, stop):
    made, ticket = answer(n=n, stop=stop)
    token_ids, sent, events = encode(TEXT), [0] * n, []
    drain = [(index, len(token_ids), True) for index in range(n)]
    for index, count, read in [*steps, *drain]:
        index %= n
        made.on_tokens(index, token_ids[sent[index] : sent[index] + count], (), ())
        sent[index] = min(len(token_ids), sent[index] + count)
        if read:
            events += made.take()
    for index in range(n):
        made.on_end(index, FinishReason.LENGTH, -1)
    events += made.take()
    assert not made.terminal
    made.on_release(Release(cached_tokens=2, durations=Durations(total_ns=1)))
    events += [*made.take(), *made.take_last()]
    found = next((one for one in stop if one in TEXT), None)
    for index in range(n):
        assert said(events, index) == (TEXT if found is None else TEXT[: TEXT.index(found)])
    finished = [event for event in events if isinstance(event, Finished)]
    assert sorted(event.index for event in finished) == list(range(n))
    assert {event.stop for event in finished} == {found}
    assert sorted(ticket.aborts) == ([(i, AbortCause.STOP_STRING) for i in range(n)] if found else [])
    counted = sum(len(event.token_ids) for event in events if isinstance(event, Delta))
    assert made.usage.completion_tokens == counted
    assert made.refusal is None


def test_tokens_after_a_stop_string_in_the_same_event_are_dropped():
    made, _ = answer(stop=("STOP",))
    token_ids = encode("a STOP")
    made.on_tokens(0, [*token_ids, *encode(" more")], (), ())
    (delta,) = made.take()
    assert (delta.text, delta.token_ids) == ("a ", tuple(token_ids))


def test_a_refusal_ends_what_has_not_ended_and_keeps_what_has():
    made, _ = answer(n=2)
    made.on_end(1, FinishReason.STOP, 5)
    made.on_release(Release(refusal=Refusal(name="worker_lost", message="gone")))
    assert made.terminal
    events = [*made.take(), *made.take_last()]
    assert {(event.index, event.reason) for event in events} == {(1, FinishReason.STOP), (0, FinishReason.ERROR)}
    assert made.refusal.name == "worker_lost"


def test_an_abort_after_every_sample_ended_well_is_no_failure():
    made, ticket = answer()
    made.on_end(0, FinishReason.LENGTH, -1)
    made.abort(AbortCause.DRAIN)
    assert made.terminal
    assert made.refusal is None
    assert ticket.aborts == []


def test_the_first_abort_stays_and_is_told_once():
    made, ticket = answer()
    made.abort(AbortCause.DEADLINE)
    made.abort(AbortCause.CLIENT)
    assert not made.terminal
    made.close()
    assert made.terminal
    assert made.refusal.name == "deadline_exceeded"
    assert ticket.aborts == [(-1, AbortCause.DEADLINE)]
    assert ticket.forgotten


def test_more_unread_than_allowed_ends_the_answer_and_frees_it():
    made, ticket = answer(max_unread_bytes=100)
    made.on_tokens(0, encode("x") * 20, (), ())
    assert made.refusal.name == "client_stalled"
    assert made.take() == []
    assert ticket.aborts == [(-1, AbortCause.STALLED)]


def test_reading_makes_room_again():
    made, _ = answer(max_unread_bytes=100)
    for _ in range(50):
        made.on_tokens(0, encode("x"), (), ())
        made.take()
    assert made.refusal is None


def test_an_end_by_nobody_named_is_a_cancellation():
    made, _ = answer()
    made.on_end(0, FinishReason.ABORT, -1)
    made.on_release(Release())
    assert made.refusal.name == "cancelled"
    assert made.take_last()[0].reason is FinishReason.ABORT


def test_prompt_logprobs_come_together_from_their_parts():
    made, _ = answer(want=Want(prompt_logprobs=0))
    made.on_tokens(0, (), (), [TokenLogprobs(-1.0, 1)])
    assert made.prompt_logprobs is None
    made.on_tokens(0, encode("x"), (), [TokenLogprobs(-2.0, 3)])
    assert [(one.token_id, one.logprob, one.rank) for one in made.prompt_logprobs] == [
        (10, 0.0, 0),
        (11, -1.0, 1),
        (12, -2.0, 3),
    ]


def test_the_logprobs_of_a_one_token_prompt_are_told_where_they_are_wanted_and_only_there():
    wanted, _ = answer(prompt=[10], want=Want(prompt_logprobs=0))
    unwanted, _ = answer(prompt=[10])
    assert ([one.token_id for one in wanted.prompt_logprobs], unwanted.prompt_logprobs) == ([10], None)


def test_waiting_ends_when_something_changed_and_only_then():
    async def test():
        made, _ = answer()
        made.on_tokens(0, encode("x"), (), ())
        async with asyncio.timeout(1):
            await made.wait()
        waiting = asyncio.ensure_future(made.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        made.on_release(Release())
        async with asyncio.timeout(1):
            await waiting

    asyncio.run(test())
