"""Steps that begin before the ones before them are read: the same answers as one step after the other."""

import asyncio
import random
import time

import pytest
import torch

from services.worker.execute.device_thread import DeviceThread
from services.worker.memory.copies import Arrival
from services.worker.models.decoder import load_decoder
from services.worker.plan import MAX_BEGUN_STEPS, StepError
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


class SlowArrival(Arrival):
    """Comes a little later, as from a device that computes: the device thread has time to begin the next step."""

    def wait(self):
        time.sleep(0.002)


class SlowCopies(LateCopies):
    def fetch(self, tensors):
        return SlowArrival([tensor.clone() for tensor in tensors])


@pytest.mark.parametrize("seed", range(2))
def test_the_device_thread_overlaps_steps_of_a_real_runner_and_answers_the_same(decoder, seed):
    rng = random.Random(seed)
    prompts = [[rng.randint(2, 380) for _ in range(rng.randint(2, 12))] for _ in range(4)]
    expected = [answer_alone(make_runner(decoder), make_asked(prompt, 8)).tokens for prompt in prompts]
    runner, most_begun = make_runner(decoder, copies=SlowCopies()), 0
    begin = runner.begin

    def noted(plan):
        nonlocal most_begun
        pending = begin(plan)
        most_begun = max(most_begun, len(runner._begun))
        return pending

    runner.begin = noted
    admits = [make_admit(slot, prompt) for slot, prompt in enumerate(prompts)]
    rows = [(slot, len(prompt), True, (3 * slot, 3 * slot + 1, 3 * slot + 2)) for slot, prompt in enumerate(prompts)]
    plans = [make_plan(1, rows, admits)] + [
        make_plan(step, [(slot, 1, True, ()) for slot in range(4)]) for step in range(2, 9)
    ]

    async def run():
        device, results = DeviceThread(runner), asyncio.Queue()
        device.start()
        await device.begin(1)
        for plan in plans:
            device.submit(plan, epoch=1, arrived_ns=0, deliver=results.put_nowait)
        answers = [await asyncio.wait_for(results.get(), 10) for _ in plans]
        assert await device.stop(5)
        return answers

    answers = asyncio.run(run())
    assert [answer.error for answer in answers] == [""] * len(plans)
    assert [[int(answer.output.tokens[slot]) for answer in answers] for slot in range(4)] == expected
    assert most_begun == MAX_BEGUN_STEPS
