"""The bundled model by the runner of a worker on a GPU: beside its CPU self, overlapped, from graphs, and bit for bit
whatever the batch. Skipped where there is no GPU; `python -m ops.bench.gpu --sections correctness` runs it."""

import random

import pytest
import torch

from services.worker.execute.graphs import CudaCapture
from services.worker.memory.copies import CudaCopies
from services.worker.models.decoder import load_decoder
from shared.checkpoint import BUNDLED_FOLDER, open_checkpoint
from shared.sampling import Sampling
from tests.builders.runners import answer_all, make_asked, make_runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PLANNED = {"num_blocks": 4096, "block_size": 16, "max_num_seqs": 256}
ROOM = PLANNED | {"max_model_len": 512}
DEVICE = torch.device("cuda")
SEEDED = Sampling(seed=7, temperature=0.8, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def decoders():
    made = {}

    def decoder(dtype, device="cuda"):
        if (dtype, device) not in made:
            made[dtype, device] = load_decoder(open_checkpoint(BUNDLED_FOLDER), dtype, device)
        return made[dtype, device]

    return decoder


def runner_of(decoder, *, graphs=False, **fields):
    runner = make_runner(decoder, copies=CudaCopies(DEVICE), device="cuda", **ROOM, **fields)
    if graphs:
        runner.capture_graphs(decoder, CudaCapture(DEVICE), max_num_tokens=512)
    return runner


def prompts(count, longest=150):
    rng = random.Random(count)
    return [[rng.randint(5, 4000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def alone(runner, asked):
    """The whole prompt in one step, then token by token."""
    return answer_all(runner, [asked], random.Random(0), chunk=10**6, preempt=0.0, **PLANNED)[0]


def bits(asked):
    """What was answered, to the last bit."""
    told = [
        (entry.logprob, entry.rank, entry.top_ids.tolist(), entry.top_logprobs.tolist()) for entry in asked.logprobs
    ]
    return asked.tokens, told


def test_float32_answers_as_the_cpu_does(decoders):
    for prompt in prompts(4):
        here = alone(runner_of(decoders(torch.float32)), make_asked(prompt, 48))
        there = alone(make_runner(decoders(torch.float32, "cpu"), **ROOM), make_asked(prompt, 48))
        assert here.tokens == there.tokens


@pytest.mark.parametrize("graphs", [False, True])
def test_bfloat16_is_close_to_float32_step_by_step(decoders, graphs):
    """Fed the same tokens: what the CPU answers in float32 is among the likeliest here."""
    agreed = total = 0
    for prompt in prompts(6):
        expected = alone(make_runner(decoders(torch.float32, "cpu"), **ROOM), make_asked(prompt, 24)).tokens
        for length in (1, 8, 23):
            known = prompt + expected[:length]
            found = alone(
                runner_of(decoders(torch.bfloat16), graphs=graphs and length == 8), make_asked(known, 2)
            ).tokens
            agreed += found[0] == expected[length]
            total += 1
    assert agreed >= 0.8 * total, f"{agreed} of {total}"


@pytest.mark.parametrize(("batch", "graphs"), [(3, False), (16, True), (64, False), (64, True), (256, True)])
def test_an_exact_answer_has_the_same_bits_in_every_batch(decoders, batch, graphs):
    """Tokens and logprobs, under random chunks, preemption and two steps in flight; alone without graphs."""
    decoder = decoders(torch.bfloat16)
    lone_runner = runner_of(decoder, deterministic=True)
    asked = prompts(batch)
    chosen = range(0, batch, max(1, batch // 12))
    expected = {i: alone(lone_runner, make_asked(asked[i], 16, logprobs=2)) for i in chosen}
    together = [make_asked(prompt, 16, logprobs=2) for prompt in asked]
    answer_all(
        runner_of(decoder, deterministic=True, graphs=graphs), together, random.Random(batch),
        chunk=40, preempt=0.01, ahead=1, **PLANNED,
    )  # fmt: skip
    for i in chosen:
        assert bits(together[i]) == bits(expected[i]), i


@pytest.mark.parametrize("sampling", [None, SEEDED])
def test_overlapped_steps_from_graphs_answer_as_eager_ones(decoders, sampling):
    """A step from a graph runs the same kernels on more rows; a near tie may then fall otherwise, rarely."""
    decoder = decoders(torch.bfloat16)
    fields = {"sampling": sampling} if sampling else {}
    eager = [make_asked(prompt, 24, **fields) for prompt in prompts(24)]
    answer_all(runner_of(decoder), eager, random.Random(1), chunk=500, preempt=0.0, **PLANNED)
    replayed = [make_asked(prompt, 24, **fields) for prompt in prompts(24)]
    answer_all(runner_of(decoder, graphs=True), replayed, random.Random(2), chunk=500, preempt=0.0, ahead=1, **PLANNED)
    same = sum(a.tokens == b.tokens for a, b in zip(eager, replayed, strict=True))
    assert same >= 12, f"{same} of {len(eager)} answers are the same"
