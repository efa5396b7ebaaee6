"""No compilation in live traffic: what a soak of mixed steps asks for was declared, and so compiled, before."""

import functools
import random

import pytest
import torch

from kernels.fused import launch
from kernels.fused.launch import ALIGNMENT, observed
from kernels.ops import choice, forms
from services.worker.memory.layout import layout_of
from services.worker.models.decoder import load_decoder
from services.worker.warm import shape_of
from shared.checkpoint import open_checkpoint
from shared.sampling import Sampling
from tests.builders.plans import make_admit, make_plan
from tests.builders.runners import LateCopies, make_runner
from tests.counts import count
from tests.kernels.fused.test_graphs import CalledAgain
from tests.models.twins import make_twin

EVERYTHING = Sampling(
    seed=5, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.2,
    logit_bias=((3, 2.0),),
)  # fmt: skip
KINDS = (
    {},
    {"sampling": Sampling(seed=2, temperature=0.7)},
    {"sampling": EVERYTHING, "logprobs": 2, "min_tokens": 6, "stop_token_ids": [4, 5]},
    {"prompt_logprobs": 1},
    {"logprobs": 0},
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Tensors of a GPU begin at multiples of 512 bytes, and only views begin elsewhere."""
    monkeypatch.setattr(choice, "is_fused", lambda tensor: True)
    monkeypatch.setattr(
        launch, "_is_aligned", lambda tensor: tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0
    )


def soak(runner, rng, num_groups):
    """Prompts of all kinds whole and in chunks, decoding rows alone and beside them, exact steps."""
    admits = [make_admit(i, [rng.randint(2, 380) for _ in range(3 + i)], **kind) for i, kind in enumerate(KINDS)]
    plan = functools.partial(make_plan, num_groups=num_groups)
    counts = [len(admit.token_ids) for admit in admits]
    runner.run(plan(1, [(i, counts[i], True, (2 * i, 2 * i + 1)) for i in range(3)], admits[:3]))
    rows = [(i, 1, True, ()) for i in range(3)]
    runner.run(plan(2, [*rows[:2], (3, 4, False, (6, 7)), (4, counts[4], True, (8, 9))], admits[3:]))
    runner.run(plan(3, [(3, counts[3] - 4, True, ()), rows[2]]))
    runner.run(plan(4, rows))
    runner.run(plan(5, [rows[1]]))
    runner.run(plan(6, [rows[0], (4, 1, True, ())], exact=True))


SOAKED = (
    "llama", "qwen2-window", "qwen2-moe", "cohere2", "gpt2", "opt-post-norm", "phi3", "gptj", "mpt-clipped",
    "falcon-rw", "gemma2", "cohere-qk-norm", "olmoe", "gpt-oss",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # in gelu_tanh: it gives 0
@pytest.mark.parametrize("name", SOAKED[: count("soaked_twins")])
def test_a_soak_of_mixed_steps_asks_for_declared_forms_only(name, tmp_path, device):
    decoder = load_decoder(open_checkpoint(make_twin(name, tmp_path)), torch.bfloat16, device)
    runner = make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=device)
    layout = layout_of(decoder.spec, decoder.dtype, 8)
    declared = forms.forms(decoder.products(), **shape_of(decoder.spec, layout, 256))
    with observed() as asked:
        runner.capture_graphs(decoder, CalledAgain(), max_num_tokens=16)
        soak(runner, random.Random(0), decoder.num_groups)
    strangers = set(asked) - set(declared)
    assert not strangers, [(form.name, nearest(form, declared)) for form in strangers]
    assert len({form.name for form in asked}) > 15, "the soak is to need most kernels"


def test_a_soak_in_float32_asks_for_exact_forms_only(tmp_path, device):
    decoder = load_decoder(open_checkpoint(make_twin("qwen2-window", tmp_path)), torch.float32, device)
    runner = make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=device)
    declared = forms.forms(decoder.products(), **shape_of(decoder.spec, layout_of(decoder.spec, decoder.dtype, 8), 256))
    with observed() as asked:
        soak(runner, random.Random(0), decoder.num_groups)
    strangers = set(asked) - set(declared)
    assert not strangers, [(form.name, nearest(form, declared)) for form in strangers]
    assert not {form.name for form in declared} & {"_decode_kernel"}, "compiled, and never launched"


def nearest(form, declared):
    """How a form differs from the declared one that is most like it, for the message."""
    fields = ("types", "aligned", "constants", "num_warps", "num_stages")
    same_kernel = [each for each in declared if each.name == form.name]
    differences = [
        {
            field: set(map(str, getattr(form, field))) ^ set(map(str, getattr(each, field)))
            if field in ("types", "aligned", "constants")
            else (getattr(form, field), getattr(each, field))
            for field in fields
            if getattr(form, field) != getattr(each, field)
        }
        for each in same_kernel
    ]
    return min(differences, key=lambda one: len(str(one)), default="never declared")


def test_the_comparison_above_sees_another_width(tmp_path):
    decoder = load_decoder(open_checkpoint(make_twin("llama", tmp_path)), torch.bfloat16)
    layout = layout_of(decoder.spec, decoder.dtype, 8)
    shape = shape_of(decoder.spec, layout, 256)
    mine = forms.forms(decoder.products(), **shape)
    other = forms.forms(decoder.products(), **shape_of(decoder.spec, replace_block(layout), 256))
    assert set(mine) - set(other)


def replace_block(layout):
    return type(layout)(layout.num_layers, layout.num_kv_heads, 16, layout.head_dim, layout.dtype)
