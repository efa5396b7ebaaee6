"""What a spec says of a model's size is what its checkpoint holds, tensor by tensor, for every twin."""

import json
import math

import pytest
import torch

from services.worker.memory.layout import layout_of
from services.worker.models.facts import facts_of
from services.worker.models.registry import translate
from services.worker.models.size import attention_matrices, feed_forward_matrices, sizes_of
from services.worker.models.spec import Experts
from services.worker.models.weights import expected_tensors
from shared.cache_groups import PADDING
from shared.checkpoint import open_checkpoint
from tests.models.twins import TWINS, make_twin

OF_ATTENTION = ("attn", "attention", "self_attn", "self_attention")
OF_FEED_FORWARD = ("mlp", "fc1", "fc2", "ffn", "block_sparse_moe")
A100 = {"flops": 312e12, "bytes_per_second": 2e12}


def kind_of(tensor: str) -> str:
    """What a tensor is for, by the name that transformers gives it."""
    parts = tensor.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return "norms" if "norm" in tensor or "ln_f" in tensor else "embedding"
    part = parts[layer + 1]
    return "attention" if part in OF_ATTENTION else "feed_forward" if part in OF_FEED_FORWARD else "norms"


def spec_of(name, folder):
    return translate(json.loads((make_twin(name, folder) / "config.json").read_text())).spec


@pytest.mark.parametrize("name", TWINS)
def test_sizes_are_those_of_the_tensors_of_a_checkpoint(name, twin_folder):
    checkpoint = open_checkpoint(make_twin(name, twin_folder))
    family = translate(checkpoint.config)
    numbers = {tensor: math.prod(header.shape) for tensor, header in checkpoint.tensors.items()}
    counted = dict.fromkeys(("embedding", "attention", "feed_forward", "norms"), 0)
    for tensor, number in numbers.items():
        counted[kind_of(tensor)] += number
    sizes, kind = sizes_of(family.spec), family.spec.feed_forward
    assert {each: getattr(sizes, each) for each in counted} == counted
    assert sizes.total == sum(numbers.values()) == sum(math.prod(shape) for _, shape in expected_tensors(family))
    of_experts = sum(each for tensor, each in numbers.items() if ".experts." in tensor and not tensor.endswith("bias"))
    idle = of_experts - of_experts * kind.top_k // kind.count if isinstance(kind, Experts) else 0
    assert sizes.active == sizes.total - idle
    assert (idle > 0) == isinstance(kind, Experts)


@pytest.mark.parametrize("name", TWINS)
def test_the_cache_of_a_token_is_what_a_block_costs(name, twin_folder):
    spec = spec_of(name, twin_folder)
    facts = facts_of(
        spec, dtype="bfloat16", itemsize=2, context=100, block_size=16, chunk=32, memory_bytes=10**8, **A100
    )
    layout = layout_of(spec, torch.bfloat16, 16)
    assert (facts.block_bytes, facts.num_groups) == (layout.bytes_per_block, len(layout.windows))
    assert facts.kv_bytes_per_token <= layout.bytes_per_token <= facts.kv_bytes_per_token * (1 + 1 / PADDING)
    assert facts.kv_bytes_per_token == 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert sum(each.layers for each in facts.windows) == spec.num_layers
    assert facts.num_blocks == (10**8 - facts.weight_bytes) // facts.block_bytes
    held = [7 if window is None else min(7, (window + 32 + 13) // 16 + 1) for window in layout.windows]
    assert facts.requests == facts.num_blocks // sum(held)


def test_the_rule_of_thumb_is_exact_for_a_model_of_its_form(twin_folder):
    spec = spec_of("gpt2", twin_folder)
    matrices = attention_matrices(spec) + feed_forward_matrices(spec.feed_forward, spec.hidden_size)[0]
    facts = facts_of(spec, dtype="float16", itemsize=2, context=1, block_size=16, chunk=32, memory_bytes=0, **A100)
    assert spec.num_layers * matrices == facts.rule_of_thumb == 12 * 3 * 64 * 64
    assert (facts.num_blocks, facts.requests) == (0, 0)


LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def facts_on_an_a100(itemsize=2, context=4096, **changes):
    spec, memory = translate(LLAMA_7B | changes).spec, 72 * 10**9
    return facts_of(
        spec, dtype="x", itemsize=itemsize, context=context, block_size=16, chunk=32, memory_bytes=memory, **A100
    )


def test_llama_7b_on_an_a100_by_hand():
    facts = facts_on_an_a100()
    assert facts.total_parameters == 6_738_415_616
    assert facts.kv_bytes_per_token == 2 * 2 * 32 * 32 * 128
    assert facts.num_blocks == (72 * 10**9 - 2 * 6_738_415_616) // (16 * 524_288)
    assert facts.requests == facts.num_blocks // 256
    assert facts.ratio == pytest.approx(156)
    assert facts.compute_bound_rows == pytest.approx(156)
    assert facts.compute_bound_rows_at_context is None, "reading 2 GiB of cache a row takes longer than computing it"


def test_wider_weights_and_idle_experts_take_more_rows_to_fill_the_arithmetic():
    assert facts_on_an_a100(itemsize=4).compute_bound_rows == pytest.approx(2 * 156)
    mixtral = facts_on_an_a100(architectures=["MixtralForCausalLM"], num_key_value_heads=32)
    every, used = (32 * (4 * 4096**2 + 3 * count * 4096 * 11008 + 8 * 4096) + 32000 * 4096 for count in (8, 2))
    assert mixtral.compute_bound_rows == pytest.approx(156 * every / used)


def test_a_short_context_takes_some_more_rows():
    facts = facts_on_an_a100(context=16)
    assert facts.compute_bound_rows_at_context is not None
    assert 156 < facts.compute_bound_rows_at_context < 200
