"""Frequencies equal transformers' own functions; none depends on how a prompt was cut."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.worker.layers.positions import RopeTable, attention_factor, inverse_frequencies
from services.worker.models.decoder import load_decoder
from services.worker.models.registry import translate
from shared.checkpoint import open_checkpoint
from tests.models.paging import Harness
from tests.models.twins import BASE, TWINS, make_twin

ROPES = {name: twin.settings for name, twin in TWINS.items() if "rope_type" in twin.settings.get("rope_parameters", {})}


def family_and_config(name):
    config = getattr(transformers, f"{TWINS[name].config}Config")(**(BASE | ROPES[name]))
    config.architectures = [TWINS[name].architecture]
    return translate(config.to_dict()), config


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("position", [0, 10, 47, 48, 63, 64, 127, 128, 200, 511])
def test_frequencies_equal_those_of_transformers_at_the_same_length(name, position):
    family, config = family_and_config(name)
    kind = config.rope_parameters["rope_type"]
    spec = family.spec
    if kind == "default":
        expected, factor = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=position + 1)
    rope = spec.serving(position + 1).positions.ropes[0]
    actual = inverse_frequencies(rope, spec.positions.dim, torch.tensor([position]))[0]
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-9)


def test_a_dynamic_prompt_beyond_the_trained_length_equals_transformers_fed_token_by_token(twin_folder):
    path = make_twin("llama-dynamic", twin_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(2, 384, (90,), generator=torch.Generator().manual_seed(4))
    expected, cache = [], None
    with torch.no_grad():
        for token in tokens:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits[0, 0])
    harness = Harness(load_decoder(open_checkpoint(path), torch.float32))
    logits = harness.step([(harness.row(tokens.tolist()), 90)])
    torch.testing.assert_close(logits, torch.stack(expected), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("name", "length"), [("llama-longrope", 150), ("phi3-longrope", 200)])
def test_a_longrope_stretched_to_longer_contexts_equals_transformers_for_a_longer_prompt(name, length, twin_folder):
    path = make_twin(name, twin_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(2, 384, (length,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    logits = {}
    for longest in (0, length):
        harness = Harness(load_decoder(open_checkpoint(path), torch.float32, max_model_len=longest))
        row = harness.row(tokens.tolist())
        logits[longest] = torch.cat([harness.step([(row, count)]) for count in (40, 1, length - 41)])
    torch.testing.assert_close(logits[length], expected, rtol=2e-4, atol=2e-4)
    assert float((logits[0] - expected).abs().max()) > 0.1, "the short factors are others"


def test_a_position_has_the_same_entry_whoever_asks_first():
    family, _ = family_and_config("llama-dynamic")
    one, two = (RopeTable(family.spec.positions.ropes[0], 16, torch.float32) for _ in range(2))
    one.gather(torch.tensor([5]), 6)
    positions = torch.tensor([0, 5, 2047, 2048, 5000])
    for mine, other in zip(one.gather(positions, 5001), two.gather(positions, 5001), strict=True):
        assert torch.equal(mine, other)
