"""The pretend runner is itself a test's measure: it must be steady, and it must notice."""

import random

import pytest

from services.worker.plan import PlanError, StepError
from shared.sampling import Sampling
from tests.builders.plans import GREEDY, make_admit, make_plan
from tests.builders.pretend_worker import FIRST_TOKEN_ID, PretendRunner, pretend_token
from tests.builders.runners import answer_all, answer_alone, make_asked


def make_runner():
    return PretendRunner(num_blocks=64, block_size=8, max_num_seqs=16, max_model_len=256)


def requests():
    rng = random.Random(3)
    kinds = [{"sampling": Sampling(seed=seed), "sample_index": seed % 3} if seed % 2 else {} for seed in range(12)]
    return [make_asked([rng.randint(0, 511) for _ in range(rng.randint(1, 40))], 8, **kind) for kind in kinds]


def test_batches_chunks_and_preemptions_do_not_change_what_it_answers():
    alone = [answer_alone(make_runner(), asked).tokens for asked in requests()]
    together = answer_all(make_runner(), requests(), random.Random(1))
    assert [asked.tokens for asked in together] == alone


def test_its_tokens_follow_from_the_history_as_pretend_token_says():
    asked = answer_alone(make_runner(), make_asked([5, 6], 3))
    assert asked.tokens[2] == pretend_token([5, 6, *asked.tokens[:2]], GREEDY)
    assert min(asked.tokens) >= FIRST_TOKEN_ID
    seeded = Sampling(seed=4)
    assert answer_alone(make_runner(), make_asked([5, 6], 1, sampling=seeded)).tokens == [pretend_token([5, 6], seeded)]


def test_it_notices_a_block_that_was_given_to_another():
    runner = make_runner()
    runner.run(make_plan(1, [(0, 3, True, (5,))], [make_admit(0, [1, 2, 3])]))
    runner.run(make_plan(2, [(1, 3, True, (5,))], [make_admit(1, [7, 8, 9])]))
    with pytest.raises(StepError, match="slot 0 reads position 0 in block 5"):
        runner.run(make_plan(3, [(0, 1, True, ())]))


def test_it_notices_a_false_prefix_hit_and_takes_a_true_one():
    runner = make_runner()
    prefix = list(range(20, 28))
    runner.run(make_plan(1, [(0, 9, True, (1, 2))], [make_admit(0, [*prefix, 30])]))
    output = runner.run(make_plan(2, [(1, 1, True, (3,))], [make_admit(1, [*prefix, 31], computed=8, blocks=[1])]))
    assert output.tokens.tolist() == [pretend_token([*prefix, 31], GREEDY)]
    with pytest.raises(StepError, match="corrupt KV"):
        wrong = [*prefix[:-1], 99]
        runner.run(make_plan(3, [(2, 1, True, (4,))], [make_admit(2, [*wrong, 31], computed=8, blocks=[1])]))


def test_it_refuses_what_a_real_runner_refuses():
    with pytest.raises(PlanError, match="unknown_slot"):
        make_runner().run(make_plan(1, [(0, 1, True, (1,))]))
