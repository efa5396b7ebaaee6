"""Tiny random checkpoints, one per architecture and odd setting, as transformers itself saves them.

`make_twin(name, folder)` builds one and returns its path: weights, config, generation_config, a small byte-level
tokenizer and a chat template. Weights come from a seed, so a name always means the same model.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BASE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    "import os\nfor name in os.listdir('.'):\n    print(name)\n",
    "Größe, naïve, 東京, 😀 — text beyond ASCII.",
]


@dataclass(frozen=True)
class Twin:
    """A config class, what differs from `BASE`, and how it is saved."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"
    rope_style: str = "parameters"
    """`scaling`: config.json is rewritten to the older rope_theta + rope_scaling."""
    model: str = ""
    """The model's class, where it is not the config's name and ForCausalLM."""

    attention: str | None = None
    """Of transformers: `eager` heeds a soft cap, which what it takes by default does not."""

    spread: tuple[float, float, float] = (1.2, 1.2, 0.3)
    """Standard deviations of matrices and of embeddings, times the square root of what they sum over, and of biases."""
    seed: int = 0
    """Added to the name's own; for a twin that would say little."""

    @property
    def architecture(self) -> str:
        return self.model or f"{self.config}ForCausalLM"


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LIVELY = (4.0, 0.6, 0.1)
"""Where a model whose embeddings are its head, or that has biases everywhere, would repeat one token for ever."""
_SHORT = [1.0 + 0.05 * i for i in range(8)]
_LONG = [1.5 + 0.4 * i for i in range(8)]

TWINS: dict[str, Twin] = {
    "llama": Twin("Llama"),
    "llama-tied": Twin("Llama", {"tie_word_embeddings": True}),
    "llama-sharded": Twin("Llama", max_shard_size="100KB"),
    "llama-biases": Twin("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": Twin("Llama", {"num_key_value_heads": None}),
    "llama-mqa": Twin("Llama", {"num_key_value_heads": 1}),
    "llama-gqa8": Twin("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "llama-wide-head": Twin("Llama", {"head_dim": 32}),
    "llama-odd-head": Twin("Llama", {"head_dim": 10, "num_attention_heads": 4}),
    "llama-odd-vocab": Twin("Llama", {"vocab_size": 389, "intermediate_size": 101}),
    "llama-theta": Twin("Llama", _rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-linear": Twin("Llama", _rope("linear", factor=4.0)),
    "llama-dynamic": Twin("Llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 48}),
    "llama-yarn": Twin("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-yarn-mscale": Twin(
        "Llama",
        _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    ),
    "llama-llama3": Twin(
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-longrope": Twin(
        "Llama",
        _rope("longrope", short_factor=_SHORT, long_factor=_LONG, original_max_position_embeddings=128, factor=8.0),
    ),
    "llama-old-rope": Twin("Llama", _rope("linear", factor=2.0), rope_style="scaling"),
    "qwen2": Twin("Qwen2"),
    "qwen2-tied": Twin("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": Twin("Qwen2", {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}),
    "qwen2-alternating": Twin(
        "Qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen2-yarn": Twin("Qwen2", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": Twin("Qwen3", {"head_dim": 24}),
    "qwen3-biases": Twin("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": Twin(
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 23,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": Twin("Mistral", {"sliding_window": None}),
    "mistral-window": Twin("Mistral", {"sliding_window": 21}),
    "mistral-head": Twin("Mistral", {"sliding_window": None, "head_dim": 20}),
    "llama-geglu": Twin("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "gpt2": Twin("GPT2", model="GPT2LMHeadModel", spread=LIVELY),
    "gpt2-inner": Twin("GPT2", {"n_inner": 100, "activation_function": "relu"}, model="GPT2LMHeadModel", spread=LIVELY),
    "gpt-bigcode": Twin("GPTBigCode", spread=LIVELY),
    "gpt-bigcode-mha": Twin("GPTBigCode", {"multi_query": False}, spread=LIVELY),
    "opt": Twin("OPT", {"ffn_dim": 172, "word_embed_proj_dim": 64}, spread=LIVELY),
    "opt-post-norm": Twin(
        "OPT", {"ffn_dim": 172, "do_layer_norm_before": False, "word_embed_proj_dim": 40}, spread=LIVELY
    ),
    "xglm": Twin("XGLM", {"ffn_dim": 172}, spread=LIVELY),
    "gpt-neox": Twin("GPTNeoX", {"hidden_act": "gelu"}, spread=LIVELY),
    "gpt-neox-sequential": Twin("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 0.5}, spread=LIVELY),
    "gptj": Twin("GPTJ", {"rotary_dim": 12}, spread=LIVELY),
    "phi": Twin("Phi", {"partial_rotary_factor": 0.5}, spread=LIVELY),
    "phi-relu-squared": Twin("Phi", {"hidden_act": "relu2"}, spread=LIVELY),
    "phi3": Twin("Phi3", {"sliding_window": 27}, spread=LIVELY),
    "phi3-longrope": Twin(
        "Phi3",
        {"original_max_position_embeddings": 128}
        | _rope("longrope", short_factor=_SHORT[:6], long_factor=_LONG[:6], partial_rotary_factor=0.75),
    ),
    "bloom": Twin("Bloom", spread=LIVELY, seed=1),
    "bloom-six-heads": Twin("Bloom", {"num_attention_heads": 6, "hidden_size": 72}, spread=LIVELY),
    "mpt": Twin("Mpt", spread=LIVELY),
    "mpt-clipped": Twin("Mpt", {"attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3}}, spread=LIVELY, seed=1),
    "falcon": Twin("Falcon", spread=LIVELY),
    "falcon-40b": Twin("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, spread=LIVELY),
    "falcon-rw": Twin(
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_kv_heads": 4},
        spread=LIVELY,
        seed=3,
    ),
    "starcoder2": Twin("Starcoder2", {"sliding_window": 25}, spread=LIVELY),
    "gemma": Twin("Gemma", {"head_dim": 16}),
    "gemma2": Twin(
        "Gemma2",
        {"head_dim": 16, "sliding_window": 17, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
        attention="eager",
    ),
    "gemma3": Twin(
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 17, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3}
        | {"final_logit_softcapping": None},
        model="Gemma3ForCausalLM",
    ),
    "gemma3-linear": Twin(
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 17,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        model="Gemma3ForCausalLM",
        spread=LIVELY,
    ),
    "cohere": Twin("Cohere", {"logit_scale": 0.3}),
    "cohere-qk-norm": Twin("Cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    "cohere2": Twin("Cohere2", {"sliding_window": 18, "sliding_window_pattern": 3, "logit_scale": 0.5}),
    "cohere2-no-positions": Twin("Cohere2", {"layer_types": ["full_attention"] * 3, "logit_scale": 0.5}),
    "mixtral": Twin(
        "Mixtral", {"intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "qwen2-moe": Twin(
        "Qwen2Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "norm_topk_prob": False},
    ),
    "qwen3-moe": Twin(
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
        | {"head_dim": 24},
    ),
    "olmoe": Twin("Olmoe", {"intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 1.5}),
    "gpt-oss": Twin(
        "GptOss",
        {"head_dim": 16, "sliding_window": 17, "num_local_experts": 6, "num_experts_per_tok": 2}
        | {"intermediate_size": 48}
        | _rope("yarn", factor=8.0, original_max_position_embeddings=64, truncate=False),
    ),
}


TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Of GPT-2, roughly: the twin's weights are to be of one order, no more."""


def make_twin(name: str, folder: Path | str) -> Path:
    """Write the checkpoint of a twin to `folder / name` and return that path; what is there already is kept."""
    path = Path(folder) / name
    if (path / "config.json").is_file():
        return path
    twin = TWINS[name]
    config = getattr(transformers, f"{twin.config}Config")(**(BASE | twin.settings))
    model = getattr(transformers, twin.architecture)(config)
    _randomise(model, sum(name.encode()) + twin.seed, *twin.spread)
    model.generation_config.eos_token_id = 1
    path.mkdir(parents=True, exist_ok=True)
    _tokenizer().save_pretrained(path)
    model.save_pretrained(path, max_shard_size=twin.max_shard_size)
    if twin.rope_style == "scaling":
        _age_rope(path / "config.json")
    return path


def _randomise(model: torch.nn.Module, seed: int, of_matrices: float, of_embeddings: float, of_biases: float) -> None:
    """Weights large enough that greedy decoding wanders instead of repeating one token."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=of_biases, generator=generator)
            elif parameter.ndim > 1 and "norm" not in name:
                fan_in = parameter.shape[0] if name.endswith(TRANSPOSED) else parameter.shape[-1]
                spread = of_embeddings if id(parameter) in tables else of_matrices
                parameter.normal_(std=spread * fan_in**-0.5, generator=generator)
            else:
                parameter.normal_(mean=1.0, std=0.2, generator=generator)


def _age_rope(file: Path) -> None:
    """Write rope parameters as transformers 4 did."""
    import json

    config = json.loads(file.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    config["rope_scaling"] = parameters
    file.write_text(json.dumps(config))


@cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
