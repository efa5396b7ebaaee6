"""Small twins of many model families by the runner of a worker on a GPU: bit for bit whatever the batch, beside their
CPU selves, and from graphs. Skipped where there is no GPU; `python -m ops.bench.gpu --sections correctness` runs it.

Logprobs are compared up to the first token in which two answers differ, that token's included: so far both were given
the same. Where they are close, tokens can only differ at a near tie.
"""

import random
from functools import cache

import numpy as np
import pytest
import torch

from services.worker.execute.graphs import CudaCapture, buckets_upto, exact_buckets_upto
from services.worker.memory.copies import CudaCopies
from services.worker.memory.layout import layout_of
from services.worker.models.decoder import load_decoder
from shared.checkpoint import open_checkpoint
from tests.builders.runners import answer_all, make_asked, make_runner
from tests.kernels.fused.test_runner_on_gpu import bits
from tests.models.twins import make_twin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

TWINS = (
    "llama",
    "llama-odd-head",  # of 10, and 20 bytes: no vector of 16 bytes begins with a head
    "qwen3",  # norms of heads, which are 24 wide
    "qwen2-window",  # layers with a window beside some without
    "gemma2",  # soft caps, a window in every other layer
    "gpt-oss",  # sinks, and experts with biases
    "mixtral",  # experts
    "qwen2-moe",  # experts beside a shared one
    "bloom",  # ALiBi
    "gpt2",  # LayerNorm, learned positions
    "gptj",  # attention beside the feed-forward, neighbours turn together
)
DEVICE = torch.device("cuda")
PLANNED = {"num_blocks": 256, "block_size": 16, "max_num_seqs": 12}
ROOM = PLANNED | {"max_model_len": 128}
TOLD = 32
"""The most likely ids of each token, whose logprobs are compared."""


@pytest.fixture(scope="module")
def decoder_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return cache(lambda name, dtype, device: load_decoder(open_checkpoint(make_twin(name, folder)), dtype, device))


@pytest.fixture(autouse=True)
def one_thread():
    """For a twin is small, and a test runs on each core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runner_of(decoder, **fields):
    return make_runner(decoder, copies=CudaCopies(DEVICE), device=DEVICE.type, **ROOM, **fields)


def answered(runner, decoder, asked, seed=0, *, chunk=20, preempt=0.0, ahead=1):
    """The same plans for the same seed, lengths and windows."""
    windows = layout_of(decoder.spec, decoder.dtype).windows
    how = {"chunk": chunk, "preempt": preempt, "ahead": ahead, "windows": windows}
    return answer_all(runner, asked, random.Random(seed), **how, **PLANNED)


def alone(runner, decoder, asked):
    """The whole prompt in one step, then token by token."""
    return answered(runner, decoder, [asked], chunk=10**6, ahead=0)[0]


def prompts(count, longest=60):
    rng = random.Random(count)
    return [[rng.randint(2, 380) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def distances(mine, theirs):
    """By token that both were given the same before: how far apart the logprobs of likely ids are at most; infinitely
    where few ids are likely for both."""
    found = []
    for place, (here, there) in enumerate(zip(mine.logprobs, theirs.logprobs, strict=True)):
        common, at, its = np.intersect1d(here.top_ids, there.top_ids, return_indices=True)
        apart = np.abs(here.top_logprobs[at] - there.top_logprobs[its])
        found.append(float(apart.max()) if len(common) > TOLD // 2 else float("inf"))
        if mine.tokens[place] != theirs.tokens[place]:
            break
    return found


class CountedGraphs:
    """`replayed` counts the calls of each graph, in the order of their captures."""

    def __init__(self):
        self._capture, self.replayed = CudaCapture(DEVICE), []

    def capture(self, function):
        replay, place = self._capture.capture(function), len(self.replayed)
        self.replayed.append(0)

        def counted():
            self.replayed[place] += 1
            replay()

        return counted


@pytest.mark.parametrize("name", TWINS)
def test_an_exact_bfloat16_answer_has_the_same_bits_alone_and_among_others(decoder_of, name):
    """Tokens and logprobs, under random chunks, preemption and two steps in flight; 12 of 17 requests find a slot.
    Alone without graphs."""
    decoder, capture = decoder_of(name, torch.bfloat16, DEVICE.type), CountedGraphs()
    runner, lone = runner_of(decoder, deterministic=True), runner_of(decoder, deterministic=True)
    runner.capture_graphs(decoder, capture)
    asked = prompts(17)
    together = [make_asked(prompt, 12, logprobs=2) for prompt in asked]
    answered(runner, decoder, together, 17, preempt=0.02)
    for i in range(0, 17, 3):
        expected = alone(lone, decoder, make_asked(asked[i], 12, logprobs=2))
        assert bits(together[i]) == bits(expected), i
    assert sum(capture.replayed) > 0


@pytest.mark.parametrize("name", TWINS)
def test_float32_answers_token_for_token_as_the_cpu_does(decoder_of, name):
    """The interpreted kernels stray 1e-5 from the CPU's, and no answer here has two likeliest ids closer than 9e-4: no
    near tie excuses another token."""
    here = decoder_of(name, torch.float32, DEVICE.type)
    found = [make_asked(prompt, 16, logprobs=TOLD) for prompt in prompts(4)]
    answered(runner_of(here), here, found, 4)
    there = decoder_of(name, torch.float32, "cpu")
    for mine in found:
        theirs = alone(make_runner(there, **ROOM), there, make_asked(mine.prompt, 16, logprobs=TOLD))
        assert max(distances(mine, theirs)) < 4e-4
        assert mine.tokens == theirs.tokens


@pytest.mark.parametrize("name", TWINS)
def test_bfloat16_from_graphs_is_close_to_eager(decoder_of, name):
    """On a CPU nine of ten tokens of the fast path are within 0.07 of the exact one's, and within 0.2 of float32's. The
    others may be anywhere: where two experts nearly tie, one rounding decides which of them a token is given to."""
    decoder, capture = decoder_of(name, torch.bfloat16, DEVICE.type), CountedGraphs()
    eager, replayed = ([make_asked(prompt, 12, logprobs=TOLD) for prompt in prompts(8, 30)] for _ in range(2))
    answered(runner_of(decoder), decoder, eager, 8, chunk=12)
    runner = runner_of(decoder)
    runner.capture_graphs(decoder, capture, max_num_tokens=64)
    answered(runner, decoder, replayed, 8, chunk=12)
    num_exact, num_decode = (len(of(PLANNED["max_num_seqs"])) for of in (exact_buckets_upto, buckets_upto))
    assert sum(capture.replayed[:num_decode]) > 0
    assert sum(capture.replayed[num_decode + num_exact :]) > 0
    found = [each for pair in zip(replayed, eager, strict=True) for each in distances(*pair)]
    assert len(found) >= 48, "of 96 tokens"
    assert sum(each < 0.15 for each in found) >= 0.9 * len(found)
