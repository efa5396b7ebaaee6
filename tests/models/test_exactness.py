"""Same tokens, same logits, to the bit: whatever the chunks, the batch, the cache hits and the order of rows."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.models.decoder import Decoder, random_decoder
from tests.counts import count
from tests.models.paging import Harness, Row

BASE = {
    "vocab_size": 389,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "llama-dynamic": {
        "architectures": ["LlamaForCausalLM"],
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "qwen3-window": {
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 37,
        "max_window_layers": 1,
        "head_dim": 24,
    },
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 50, "head_dim": 10},
    "opt-post-norm": {
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": 172,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 40,
        "num_key_value_heads": None,
        "max_position_embeddings": 400,
    },
    "bloom": {"architectures": ["BloomForCausalLM"], "num_key_value_heads": None},
    "gptj": {"architectures": ["GPTJForCausalLM"], "rotary_dim": 12, "num_key_value_heads": None},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 40, "attn_logit_softcapping": 3.0},
    "cohere-qk-norm": {"architectures": ["CohereForCausalLM"], "use_qk_norm": True},
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 37,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
MAX_TOKENS = 330


@pytest.fixture(scope="module")
def decoders() -> dict[tuple[str, torch.dtype], Decoder]:
    return {
        (name, dtype): random_decoder(BASE | config, dtype, seed=3, scale=0.12)
        for name, config in CONFIGS.items()
        for dtype in (torch.float32, torch.bfloat16)
    }


@settings(max_examples=count("decoder_schedules"), deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2]),
    num_rows=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_logits_have_the_same_bits_in_any_schedule(decoders, name, dtype, threads, num_rows, seed):
    rng, before = random.Random(seed), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        harness = Harness(decoders[name, dtype], num_blocks=300, seed=seed)
        prefix = [rng.randrange(389) for _ in range(rng.choice([0, 16, 144]))]
        prompts = [prefix + [rng.randrange(389) for _ in range(rng.randint(1, 150))] for _ in range(num_rows)]
        alone = []
        for prompt in prompts:
            alone.append(harness.step([(harness.row(prompt), len(prompt))], exact=True))
        for row, logits in run_schedule(harness, prompts, len(prefix), rng):
            index, start = prompts.index(row.tokens), row.computed - len(logits)
            assert torch.equal(logits, alone[index][start : row.computed])
    finally:
        torch.set_num_threads(before)


def run_schedule(harness: Harness, prompts: list[list[int]], num_shared: int, rng: random.Random):
    """Random steps over all prompts; the later rows find their prefix in blocks of the first."""
    first = harness.row(prompts[0])
    rows, waiting = [first], prompts[1:]
    while rows or waiting:
        grants = []
        for row in rng.sample(rows, len(rows)):
            left = len(row.tokens) - row.computed
            granted = min(left, rng.choice([0, 1, 1, 3, 16, 100, 400]))
            if granted:
                grants.append((row, granted))
        planned = first.computed + sum(granted for row, granted in grants if row is first)
        if waiting and planned >= num_shared:  # the shared blocks are written in this very step at the latest
            joining = harness.row(waiting.pop(), shared=[table[: num_shared // 16] for table in first.tables])
            if len(first.tables[0]) * 16 >= num_shared:
                rows.append(joining)
                grants.append((joining, 1))
            else:
                waiting.append(joining.tokens)
        if not grants:
            continue
        logits = harness.step(grants, exact=True)
        for (row, granted), part in zip(grants, logits.split([granted for _, granted in grants]), strict=True):
            assert len(part) == granted
            yield row, part
        rows = [row for row in rows if row.computed < len(row.tokens)]


def test_float32_is_exact_without_being_asked(decoders):
    decoder = decoders["llama", torch.float32]
    tokens = torch.randint(0, 389, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    harness = Harness(decoder)
    asked = harness.step([(harness.row(tokens), 70)], exact=True)
    row: Row = harness.row(tokens)
    unasked = torch.cat([harness.step([(row, part)], exact=False) for part in (1, 30, 1, 38)])
    assert torch.equal(asked, unasked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_may_want_logits_of_some_tokens_or_of_none(decoders, dtype):
    harness = Harness(decoders["llama", dtype])
    tokens = torch.randint(0, 389, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = harness.step([(harness.row(tokens), 30)], exact=True)
    row = harness.row(tokens)
    batch = harness.batch([(row, 20)], exact=True)
    for wanted in ([], [19], [3, 7]):
        chosen = dataclasses.replace(batch, logit_rows=torch.tensor(wanted, dtype=torch.int64))
        logits = harness.decoder.forward(chosen, harness.pages)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, whole[wanted])


def test_bfloat16_takes_the_fast_path_unless_asked(decoders):
    """Were this to fail, the fast path would have become exact, and the exact mode be without a purpose."""
    decoder = decoders["llama", torch.bfloat16]
    tokens = torch.randint(0, 389, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    harness = Harness(decoder)
    asked = harness.step([(harness.row(tokens), 200)], exact=True)
    unasked = harness.step([(harness.row(tokens), 200)], exact=False)
    assert not torch.equal(asked, unasked)
    assert float((asked - unasked).norm() / asked.norm()) < 0.05
