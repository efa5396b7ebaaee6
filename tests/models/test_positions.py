"""Frequencies equal transformers' own functions, and the length-dependent types depend on the position alone."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.worker.layers.positions import RopeTable, attention_factor, inverse_frequencies
from services.worker.models.registry import translate
from tests.models.twins import BASE, TWINS

ROPES = {name: twin.settings for name, twin in TWINS.items() if "rope_type" in twin.settings.get("rope_parameters", {})}


def family_and_config(name):
    config = getattr(transformers, f"{TWINS[name].config}Config")(**(BASE | ROPES[name]))
    config.architectures = [TWINS[name].architecture]
    return translate(config.to_dict()), config


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("position", [0, 10, 47, 48, 63, 64, 200, 511])
def test_frequencies_equal_those_of_transformers_at_the_same_length(name, position):
    family, config = family_and_config(name)
    kind = config.rope_parameters["rope_type"]
    spec = family.spec
    if kind == "default":
        expected, factor = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=position + 1)
    rope = spec.positions.ropes[0]
    actual = inverse_frequencies(rope, spec.positions.dim, torch.tensor([position]))[0]
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize(("name", "length"), [("llama-dynamic", 90), ("llama-longrope", 90), ("phi3-longrope", 140)])
def test_a_prompt_beyond_the_trained_length_equals_transformers_fed_token_by_token(name, length, twin_folder):
    from services.worker.models.decoder import load_decoder
    from shared.checkpoint import open_checkpoint
    from tests.models.paging import Harness
    from tests.models.twins import make_twin

    path = make_twin(name, twin_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(2, 384, (length,), generator=torch.Generator().manual_seed(4))
    expected, cache = [], None
    with torch.no_grad():
        for token in tokens:
            out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            expected.append(out.logits[0, 0])
    harness = Harness(load_decoder(open_checkpoint(path), torch.float32))
    [logits] = [harness.step([(harness.row(tokens.tolist()), length)])]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=2e-4, atol=2e-4)


def test_a_position_has_the_same_entry_whoever_asks_first():
    family, _ = family_and_config("llama-dynamic")
    one, two = (RopeTable(family.spec.positions.ropes[0], 16, torch.float32) for _ in range(2))
    one.gather(torch.tensor([5]), 6)
    positions = torch.tensor([0, 5, 2047, 2048, 5000])
    for mine, other in zip(one.gather(positions, 5001), two.gather(positions, 5001), strict=True):
        assert torch.equal(mine, other)
