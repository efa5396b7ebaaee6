"""Blocks: what they cost, how they lie, how many fit."""

import pytest
import torch

from services.worker.memory.layout import layout_of
from services.worker.memory.pool import PoolTooSmall, allocate_pool, count_blocks
from services.worker.models.registry import translate
from services.worker.models.size import sizes_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
SPEC = translate(CONFIG).spec


def test_the_bench_model_has_213_million_parameters_and_16_kib_of_cache_per_token():
    layout = layout_of(SPEC, torch.bfloat16)
    assert sizes_of(SPEC).total == pytest.approx(213.2e6, rel=1e-3)
    assert layout.bytes_per_token == 16 * 1024
    assert layout.bytes_per_block == 16 * layout.bytes_per_token


def test_a_pool_is_laid_out_as_its_layout_says():
    layout = layout_of(SPEC, torch.float32, block_size=8)
    pool = allocate_pool(layout, 3)
    assert pool.pages.shape == (3, *layout.shape)
    assert pool.pages.stride()[1:] == layout.strides
    assert pool.pages[0].nbytes == layout.bytes_per_block
    assert pool.num_bytes == 3 * layout.bytes_per_block
    assert pool.num_blocks == 3
    assert not pool.pages.any()


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(num_tokens, blocks):
    assert layout_of(SPEC, torch.float32).blocks_for(num_tokens) == blocks


def test_blocks_fill_the_given_bytes_or_half_of_what_is_available():
    layout = layout_of(SPEC, torch.bfloat16)
    assert count_blocks(layout, memory_bytes=10 * layout.bytes_per_block + 5) == 10
    assert count_blocks(layout, available_bytes=10 * layout.bytes_per_block) == 5
    assert count_blocks(layout) > 0


def test_too_little_memory_is_refused_with_advice():
    layout = layout_of(SPEC, torch.bfloat16)
    with pytest.raises(PoolTooSmall, match="--kv-cache-memory-bytes"):
        count_blocks(layout, memory_bytes=layout.bytes_per_block - 1)
