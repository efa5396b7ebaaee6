"""A whole decoder of fused kernels: tiny twins against transformers, token for token, as tests/models does on a CPU."""

import pytest
import torch
import transformers

from kernels.ops import choice
from services.worker.models.decoder import load_decoder
from shared.checkpoint import open_checkpoint
from tests.counts import count
from tests.models.paging import Harness
from tests.models.twins import TWINS as KNOWN
from tests.models.twins import make_twin

PROMPT_TOKENS, NUM_GREEDY = 21, 4
TWINS = ("llama", "gptj", "gpt-oss", "qwen3", "gemma3", "qwen2-window", "gpt2", "bloom", "cohere-qk-norm", "olmoe")
"""Between them every kind of position, norm, block and feed-forward that has a kernel of its own."""


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(choice, "is_fused", lambda tensor: True)


def prompt_of(name: str) -> list[int]:
    return torch.randint(2, 384, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(len(name))).tolist()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # in gelu_tanh: it gives 0
@pytest.mark.parametrize("name", TWINS[: count("fused_twins")])
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path, device):
    path = make_twin(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=KNOWN[name].attention
    ).eval()
    prompt = prompt_of(name)
    harness = Harness(load_decoder(open_checkpoint(path), torch.float32, device))
    logits, tokens = harness.generate(prompt, NUM_GREEDY, chunks=[8, 1, 12])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_GREEDY, min_new_tokens=NUM_GREEDY, do_sample=False
        )
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert tokens == answer[0, PROMPT_TOKENS:].tolist()


def test_an_exact_bfloat16_token_has_the_same_bits_alone_and_beside_others(tmp_path, device):
    path = make_twin("llama", tmp_path)
    decoder = load_decoder(open_checkpoint(path), torch.bfloat16, device)
    prompt = prompt_of("llama")
    harness = Harness(decoder)
    alone = harness.row(prompt)
    whole = harness.step([(alone, PROMPT_TOKENS)], exact=True)
    beside, others = harness.row(prompt), [harness.row(prompt[i:]) for i in (1, 2)]
    first = harness.step([(others[0], 9), (beside, 13)], exact=True)[9:]
    rest = harness.step([(beside, 7), (others[1], 3)], exact=True)[:7]
    last = harness.step([(others[0], 1), (beside, 1)], exact=True)[1:]
    assert torch.equal(torch.cat((first, rest, last)), whole)
