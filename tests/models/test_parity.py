"""Logits and greedy tokens of every twin equal those of transformers in float32, and bfloat16 strays no further from
them than transformers' own; a warm prefix changes nothing."""

from pathlib import Path

import pytest
import torch
import transformers

from services.worker.models.decoder import load_decoder
from shared.checkpoint import open_checkpoint
from tests.models.paging import Harness
from tests.models.twins import TWINS, make_twin

NUM_GREEDY = 64
PROMPT_TOKENS = 41
WARM_BLOCKS = 2
"""Of 16 tokens each, shared with another row."""


def prompt_of(name: str) -> list[int]:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(2, 384, (PROMPT_TOKENS,), generator=generator).tolist()


def model_of(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    path, attention = make_twin(name, folder), TWINS[name].attention
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", TWINS)
def test_logits_and_64_greedy_tokens_equal_transformers(name, twin_folder):
    model, prompt = model_of(name, twin_folder), prompt_of(name)
    harness = Harness(load_decoder(open_checkpoint(twin_folder / name), torch.float32), seed=len(name))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
        continued = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_GREEDY,
            min_new_tokens=NUM_GREEDY,
            do_sample=False,
            suppress_tokens=None,
            eos_token_id=None,
        )[0, PROMPT_TOKENS:].tolist()
    for _ in range(2):
        logits, tokens = harness.generate(prompt, NUM_GREEDY, chunks=harness.random_chunks(PROMPT_TOKENS))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert tokens == continued
    assert len(set(continued)) > 8, "a twin that repeats itself tests little"


@pytest.mark.parametrize("name", TWINS)
def test_bfloat16_strays_no_further_than_that_of_transformers(name, twin_folder):
    """By the median token, for a router may tip to another expert at any of them."""
    prompt, known = prompt_of(name), {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            known[dtype] = model_of(name, twin_folder, dtype)(torch.tensor([prompt])).logits[0].float()
    harness = Harness(load_decoder(open_checkpoint(twin_folder / name), torch.bfloat16), seed=len(name))

    def strayed(logits: torch.Tensor) -> float:
        right = known[torch.float32]
        return float(((logits - right).norm(dim=-1) / right.norm(dim=-1)).median())

    row = harness.row(prompt)
    chunks = torch.cat([harness.step([(row, count)]) for count in (20, 1, 13, 1, 1, 5)])
    whole, exact = (harness.step([(harness.row(prompt), PROMPT_TOKENS)], exact=exact) for exact in (False, True))
    for logits in (chunks, whole, exact):
        assert strayed(logits) < 1.3 * strayed(known[torch.bfloat16]) + 1e-3
    assert strayed(whole.roll(1, 0)) > 0.1, "the comparison is to see a row out of place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TWINS)
def test_a_warm_prefix_changes_no_bit_of_an_exact_step(name, dtype, twin_folder):
    prompt = prompt_of(name)
    harness = Harness(load_decoder(open_checkpoint(make_twin(name, twin_folder)), dtype), seed=len(name))
    cold = harness.row(prompt)
    whole = harness.step([(cold, PROMPT_TOKENS)], exact=True)
    warm = harness.row(prompt, shared=[table[:WARM_BLOCKS] for table in cold.tables])
    start = warm.computed
    first = harness.step([(warm, 1), (harness.row(prompt[5:]), 7)], exact=True)[:1]
    rest = harness.step([(warm, PROMPT_TOKENS - start - 1)], exact=True)
    assert torch.equal(torch.cat((first, rest)), whole[start:])
