"""Logits and greedy tokens of every twin equal those of transformers, in float32."""

import pytest
import torch
import transformers

from services.worker.models.decoder import load_decoder
from shared.checkpoint import open_checkpoint
from tests.models.paging import Harness
from tests.models.twins import TWINS, make_twin

NUM_GREEDY = 64
PROMPT_TOKENS = 41


@pytest.mark.parametrize("name", TWINS)
def test_logits_and_64_greedy_tokens_equal_transformers(name, twin_folder):
    path = make_twin(name, twin_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    harness = Harness(load_decoder(open_checkpoint(path), torch.float32), seed=len(name))
    generator = torch.Generator().manual_seed(len(name))
    prompt = torch.randint(2, 384, (PROMPT_TOKENS,), generator=generator).tolist()
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
