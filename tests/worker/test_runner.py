import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.worker.execute import runner as runner_module
from services.worker.models.decoder import load_decoder
from services.worker.plan import PlanError, StepError
from shared.checkpoint import open_checkpoint
from shared.sampling import Sampling
from tests.builders.plans import GREEDY, make_admit, make_plan
from tests.builders.runners import answer_all, answer_alone, make_asked, make_runner
from tests.models.twins import make_twin

EVERYTHING = Sampling(
    seed=5,
    temperature=0.9,
    top_k=50,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias=((3, 2.0), (40, -4.0)),
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return make_twin("llama", tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="module")
def decoder(twin):
    return load_decoder(open_checkpoint(str(twin)), torch.float32)


@pytest.fixture(scope="module")
def oracle(twin):
    return AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()


def prompt_of(rng, low=1, high=40):
    return [rng.randint(2, 380) for _ in range(rng.randint(low, high))]


def variety(rng):
    """One request of every kind, fresh."""
    kinds = [
        {},
        {"logprobs": 3},
        {"sampling": Sampling(seed=1), "logprobs": 0},
        {"sampling": Sampling(seed=1), "sample_index": 1},
        {"sampling": Sampling(seed=2, temperature=0.7, top_p=0.9), "logprobs": 1},
        {"sampling": EVERYTHING, "logprobs": 2},
        {"min_tokens": 6, "stop_token_ids": list(range(300)), "logprobs": 0},
        {"sampling": Sampling(seed=9, temperature=0.0, repetition_penalty=1.5)},
        {"prompt_logprobs": 2, "logprobs": 1},
    ]
    return [make_asked(prompt_of(rng), rng.randint(1, 10), **kind) for kind in kinds]


def plain(asked):
    """Everything that came of a request, to be compared bit for bit."""
    logprobs = [(each.logprob, each.rank, each.top_ids.tolist(), each.top_logprobs.tolist()) for each in asked.logprobs]
    return asked.tokens, logprobs


def prompt_entries(asked):
    """position → (logprob, rank, best ids), later chunks after preemptions included; they must agree."""
    entries = {}
    for part in asked.prompt_logprobs:
        for i in range(len(part.logprobs)):
            entry = (float(part.logprobs[i]), int(part.ranks[i]), part.top_ids[i].tolist())
            assert entries.setdefault(part.start + i, entry) == entry
    return entries


def test_greedy_answers_are_those_of_transformers(decoder, oracle):
    rng = random.Random(1)
    runner = make_runner(decoder)
    for _ in range(3):
        prompt = prompt_of(rng)
        expected = oracle.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert answer_alone(runner, make_asked(prompt, 20)).tokens == expected[0, len(prompt) :].tolist()


def test_penalised_greedy_answers_are_those_of_transformers(decoder, oracle):
    prompt = [5, 6, 7, 8, 9, 5, 6]
    expected = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, repetition_penalty=1.8
    )
    asked = make_asked(prompt, 20, sampling=Sampling(seed=0, temperature=0.0, repetition_penalty=1.8))
    answer_alone(make_runner(decoder), asked)
    assert asked.tokens == expected[0, len(prompt) :].tolist()
    assert asked.tokens != answer_alone(make_runner(decoder), make_asked(prompt, 20)).tokens


@pytest.mark.parametrize("seed", range(3))
def test_batches_chunks_and_preemptions_change_no_bit(decoder, seed):
    rng = random.Random(seed)
    alone = variety(random.Random(seed))
    runner = make_runner(decoder)
    for asked in alone:
        answer_alone(runner, asked)
    together = answer_all(make_runner(decoder), variety(random.Random(seed)), rng)
    assert [plain(each) for each in together] == [plain(each) for each in alone]
    assert prompt_entries(together[-1]) == prompt_entries(alone[-1])
    assert all(each.tokens for each in alone)


def test_the_comparison_above_sees_a_changed_seed(decoder):
    runner = make_runner(decoder)
    first, second = (answer_alone(runner, make_asked([4, 5], 8, sampling=Sampling(seed=seed))) for seed in (1, 2))
    assert plain(first) != plain(second)


def test_samples_of_one_request_differ_and_repeat(decoder):
    runner = make_runner(decoder)
    answers = [
        answer_alone(runner, make_asked([4, 5, 6], 12, sampling=Sampling(seed=3), sample_index=index)).tokens
        for index in (0, 1, 0)
    ]
    assert answers[0] == answers[2] != answers[1]


def test_two_plans_in_flight_need_no_host_to_pass_the_token_on(decoder):
    """Row 0 of step 2 computes what step 1 samples, without an Admit between them."""
    runner = make_runner(decoder)
    expected = answer_alone(runner, make_asked([9, 8, 7], 3)).tokens
    runner.reset()
    plans = [
        make_plan(1, [(2, 3, True, (0,))], [make_admit(2, [9, 8, 7])]),
        make_plan(2, [(2, 1, True, ())]),
        make_plan(3, [(2, 1, True, ())]),
    ]
    assert [int(runner.run(plan).tokens[0]) for plan in plans] == expected


def test_a_shared_prefix_is_read_by_a_row_of_the_same_step(decoder):
    runner = make_runner(decoder)
    prompt = list(range(10, 26))
    expected = [answer_alone(runner, make_asked([*prompt, last], 1, logprobs=0)) for last in (30, 31)]
    runner.reset()
    admits = [
        make_admit(0, [*prompt, 30], logprobs=0),
        make_admit(1, [*prompt, 31], computed=16, blocks=[4, 5], logprobs=0),
    ]
    output = runner.run(make_plan(1, [(0, 17, True, (4, 5, 6)), (1, 1, True, (7,))], admits))
    assert output.tokens.tolist() == [each.tokens[0] for each in expected]
    assert [each.logprob for each in output.logprobs] == [each.logprobs[0].logprob for each in expected]


def test_logprobs_are_raw_and_ranked(decoder, oracle):
    prompt = [20, 21, 22, 23]
    asked = answer_alone(make_runner(decoder), make_asked(prompt, 6, sampling=EVERYTHING, logprobs=4))
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + asked.tokens])).logits[0]
    logprobs = logits.log_softmax(-1)
    for i, entry in enumerate(asked.logprobs):
        at = len(prompt) - 1 + i
        assert entry.logprob == pytest.approx(logprobs[at, asked.tokens[i]].item(), abs=1e-4)
        order = logprobs[at].argsort(descending=True).tolist()
        assert entry.rank == order.index(asked.tokens[i]) + 1
        assert entry.top_ids.tolist() == order[:4]
    assert any(entry.rank > 1 for entry in asked.logprobs)


@pytest.mark.parametrize("described_rows", [256, 4])
def test_prompt_logprobs_describe_every_prompt_token_after_the_first(decoder, oracle, described_rows, monkeypatch):
    monkeypatch.setattr(runner_module, "DESCRIBED_ROWS", described_rows)
    prompt = prompt_of(random.Random(4), 30, 30)
    asked = make_asked(prompt, 2, prompt_logprobs=3)
    answer_all(make_runner(decoder), [asked], random.Random(0), chunk=7, preempt=0)
    entries = prompt_entries(asked)
    with torch.no_grad():
        logprobs = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert sorted(entries) == list(range(1, 30))
    for position, (logprob, rank, best) in entries.items():
        order = logprobs[position - 1].argsort(descending=True).tolist()
        assert logprob == pytest.approx(logprobs[position - 1, prompt[position]].item(), abs=1e-4)
        assert (rank, best) == (order.index(prompt[position]) + 1, order[:3])


def test_the_logits_of_a_prompt_are_never_held_all_at_once(decoder, monkeypatch):
    """A prompt of 8,192 tokens with a vocabulary of 128k would take 4 GB, which nobody has set aside."""
    monkeypatch.setattr(runner_module, "DESCRIBED_ROWS", 4)
    made, head_of = [], decoder._head_of
    monkeypatch.setattr(decoder, "_head_of", lambda hidden, exact: made.append(len(hidden)) or head_of(hidden, exact))
    answer_alone(make_runner(decoder), make_asked(prompt_of(random.Random(4), 30, 30), 1, prompt_logprobs=3))
    assert sum(made) == 29 + 1 and max(made) <= 4


def test_a_chunk_whose_logits_nobody_wants_still_writes_its_pages(decoder):
    runner = make_runner(decoder)
    expected = answer_alone(runner, make_asked([9, 8, 7], 1)).tokens
    runner.reset()
    output = runner.run(make_plan(1, [(0, 2, False, (1,))], [make_admit(0, [9, 8, 7])]))
    assert len(output.tokens) == 0
    assert runner.run(make_plan(2, [(0, 1, True, ())])).tokens.tolist() == expected


def test_a_plan_without_rows_only_admits(decoder):
    runner = make_runner(decoder)
    assert len(runner.run(make_plan(1, (), [make_admit(0, [9, 8])])).tokens) == 0
    assert len(runner.run(make_plan(2, [(0, 2, True, (1,))])).tokens) == 1


def test_min_tokens_keeps_stop_tokens_away_until_then(decoder):
    runner = make_runner(decoder)
    free = answer_alone(runner, make_asked([50, 51], 8)).tokens
    stops = free[:1]
    held = answer_alone(runner, make_asked([50, 51], 8, min_tokens=3, stop_token_ids=stops)).tokens
    assert not set(held[:3]) & set(stops)
    ignored = answer_alone(runner, make_asked([50, 51], 8, min_tokens=3, stop_token_ids=list(range(384)))).tokens
    assert ignored == free


def test_a_stop_token_may_come_right_behind_min_tokens(decoder):
    eager = Sampling(seed=0, temperature=0.0, logit_bias=((77, 1000.0),))
    asked = make_asked([50, 51], 5, sampling=eager, min_tokens=3, stop_token_ids=[77])
    assert [token == 77 for token in answer_alone(make_runner(decoder), asked).tokens] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("cut", [1, 4, 9])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=0, temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0),
        Sampling(seed=0, temperature=0.0, repetition_penalty=1.9),
        EVERYTHING,
    ],
    ids=["presence and frequency", "repetition", "everything"],
)
def test_an_answer_taken_up_again_goes_on_as_if_nothing_had_happened(decoder, sampling, cut):
    """What was generated is output and not prompt, for penalties, min_tokens and noise."""
    more = {"sampling": sampling, "logprobs": 0, "min_tokens": 6, "stop_token_ids": list(range(20, 200))}
    runner = make_runner(decoder)
    prompt = [5, 6, 7, 5]
    whole = answer_alone(runner, make_asked(prompt, 10, **more))
    known = prompt + whole.tokens[:cut]
    runner.reset()
    count = len(known)
    output = runner.run(make_plan(1, [(3, count, True, (7, 8))], [make_admit(3, known, prompt_len=4, **more)]))
    tokens = [int(output.tokens[0])]
    while len(tokens) < 10 - cut:
        tokens.append(int(runner.run(make_plan(2, [(3, 1, True, ())])).tokens[0]))
    assert tokens == whole.tokens[cut:]


def test_a_bias_decides(decoder):
    asked = make_asked([50, 51], 4, sampling=Sampling(seed=0, temperature=0.0, logit_bias=((77, 1000.0),)))
    assert answer_alone(make_runner(decoder), asked).tokens == [77] * 4


def test_logits_that_are_not_numbers_fail_the_step_and_name_the_rows(decoder):
    class Broken:
        layers_done = 0

        def forward(self, batch, pool):
            logits = decoder.forward(batch, pool)
            logits[1, 5] = torch.nan
            return logits

    runner = make_runner(decoder)
    runner._decoder = Broken()
    admits = [make_admit(slot, [4, 5]) for slot in range(3)]
    with pytest.raises(StepError, match="1 of 3 rows have NaN or infinite logits"):
        runner.run(make_plan(1, [(slot, 2, True, (slot,)) for slot in range(3)], admits))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_step_is_exact_where_its_plan_or_the_worker_says_so(decoder, asked, deterministic):
    recorded = []

    class Recording:
        layers_done = 0

        def forward(self, batch, pool):
            recorded.append(batch.exact)
            return decoder.forward(batch, pool)

    runner = make_runner(decoder, deterministic=deterministic)
    runner._decoder = Recording()
    runner.run(make_plan(1, [(0, 2, True, (0,))], [make_admit(0, [4, 5])], exact=asked))
    assert recorded == [asked or deterministic]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=0, temperature=float("nan")),
        Sampling(seed=0, temperature=-1.0),
        Sampling(seed=0, repetition_penalty=0.0),
        Sampling(seed=0, logit_bias=((1, float("inf")),)),
        Sampling(seed=0, top_p=-0.1),
        Sampling(seed=0, min_p=2.0),
    ],
)
def test_sampling_that_makes_no_sense_is_refused_by_name(decoder, sampling):
    with pytest.raises(PlanError, match="sampling_out_of_range"):
        make_runner(decoder).run(make_plan(1, (), [make_admit(0, [4], sampling=sampling)]))


def test_an_admit_on_an_occupied_slot_forgets_the_one_before(decoder):
    runner = make_runner(decoder)
    expected = answer_alone(runner, make_asked([60, 61, 62], 3, sampling=GREEDY)).tokens
    runner.reset()
    runner.run(make_plan(1, [(0, 2, True, (1,))], [make_admit(0, [4, 5], sampling=EVERYTHING, logprobs=2)]))
    output = runner.run(make_plan(2, [(0, 3, True, (2,))], [make_admit(0, [60, 61, 62])]))
    assert output.logprobs == ()
    tokens = [
        int(output.tokens[0]),
        *(int(runner.run(make_plan(3 + i, [(0, 1, True, ())])).tokens[0]) for i in range(2)),
    ]
    assert tokens == expected
    assert output.tokens.dtype == np.uint32
