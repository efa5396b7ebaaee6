"""Steps that begin before the ones before them are read: the same answers as one step after the other."""

import random

import pytest
import torch

from services.worker.models.decoder import load_decoder
from services.worker.plan import StepError
from shared.checkpoint import open_checkpoint
from shared.sampling import Sampling
from tests.builders.plans import make_admit, make_plan
from tests.builders.runners import LateCopies, answer_all, answer_alone, make_asked, make_runner
from tests.models.twins import make_twin
from tests.worker.test_runner import plain, prompt_entries, variety


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = make_twin("llama", tmp_path_factory.mktemp("twins"))
    return load_decoder(open_checkpoint(str(path)), torch.float32)


def overlapped(decoder, **fields):
    return make_runner(decoder, copies=LateCopies(), **fields)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ahead", [0, 1])
def test_random_plans_give_the_same_bits_whether_steps_overlap_or_not(decoder, seed, ahead):
    alone = variety(random.Random(seed))
    runner = make_runner(decoder)
    for asked in alone:
        answer_alone(runner, asked)
    together = answer_all(overlapped(decoder), variety(random.Random(seed)), random.Random(seed), ahead=ahead)
    assert [plain(each) for each in together] == [plain(each) for each in alone]
    assert prompt_entries(together[-1]) == prompt_entries(alone[-1])


def test_a_step_takes_its_token_from_the_device_before_anybody_has_read_it(decoder):
    expected = answer_alone(make_runner(decoder), make_asked([9, 8, 7], 3)).tokens
    runner = overlapped(decoder)
    first = runner.begin(make_plan(1, [(2, 3, True, (0,))], [make_admit(2, [9, 8, 7])]))
    second = runner.begin(make_plan(2, [(2, 1, True, ())]))
    assert runner._slots.unread[2] == 2
    assert not first.is_computed
    tokens = [int(runner.finish(each).tokens[0]) for each in (first, second)]
    third = runner.begin(make_plan(3, [(2, 1, True, ())]))
    assert [*tokens, int(runner.finish(third).tokens[0])] == expected
    assert runner._slots.tokens[2, 3:6].tolist() == expected


def test_a_late_token_is_not_written_into_a_slot_that_another_request_has_by_now(decoder):
    expected = answer_alone(make_runner(decoder), make_asked([30, 31], 2)).tokens
    runner = overlapped(decoder)
    first = runner.begin(make_plan(1, [(0, 3, True, (0,))], [make_admit(0, [9, 8, 7])]))
    second = runner.begin(make_plan(2, [(0, 2, True, (1,))], [make_admit(0, [30, 31])]))
    runner.finish(first)
    assert runner._slots.unread[0] == 1
    third = runner.begin(make_plan(3, [(0, 1, True, ())]))
    assert [int(runner.finish(each).tokens[0]) for each in (second, third)] == expected
    assert runner._slots.tokens[0, :4].tolist() == [30, 31, *expected]


def test_a_penalty_that_counts_tokens_reads_the_step_before_first(decoder):
    sampling = Sampling(seed=0, temperature=0.0, frequency_penalty=2.0)
    expected = answer_alone(make_runner(decoder), make_asked([9, 8, 7], 6, sampling=sampling)).tokens
    runner, pending = overlapped(decoder), []
    admit = make_admit(0, [9, 8, 7], sampling=sampling)
    pending.append(runner.begin(make_plan(1, [(0, 3, True, (0, 1))], [admit])))
    for step in range(2, 7):
        pending.append(runner.begin(make_plan(step, [(0, 1, True, ())])))
        assert pending[-2].output is not None
    assert [int(runner.finish(each).tokens[0]) for each in pending] == expected


def broken_in(decoder, step):
    class Broken:
        layers_done = 0
        calls = 0

        def forward(self, batch, pool):
            logits = decoder.forward(batch, pool)
            self.calls += 1
            return logits.fill_(torch.nan) if self.calls == step else logits

    return Broken()


def test_logits_that_are_not_numbers_fail_their_own_step_when_it_is_read(decoder):
    runner = overlapped(decoder)
    runner._decoder = broken_in(decoder, 2)
    first = runner.begin(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])]))
    second = runner.begin(make_plan(2, [(0, 1, True, ())]))
    assert len(runner.finish(first).tokens) == 1
    with pytest.raises(StepError, match="1 of 1 rows have NaN"):
        runner.finish(second)


def test_a_step_that_had_to_read_a_broken_one_first_fails_and_leaves_the_blame_where_it_belongs(decoder):
    sampling = Sampling(seed=0, temperature=0.0, frequency_penalty=2.0)
    runner = overlapped(decoder)
    runner._decoder = broken_in(decoder, 1)
    plain_row = make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])])
    broken = runner.begin(plain_row)
    runner._sampler.admit(make_admit(0, [4, 5], sampling=sampling))
    for _ in range(2):
        with pytest.raises(StepError, match="NaN"):
            runner.begin(make_plan(2, [(0, 1, True, ())])) if broken.error is None else runner.finish(broken)


def test_a_reset_drops_the_steps_that_were_begun(decoder):
    runner = overlapped(decoder)
    runner.begin(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])]))
    runner.reset()
    expected = answer_alone(make_runner(decoder), make_asked([9, 8, 7], 3)).tokens
    assert answer_alone(runner, make_asked([9, 8, 7], 3)).tokens == expected
