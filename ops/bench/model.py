"""The benchmark's model: a random-weight Llama of 213 M parameters, written once as a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2816,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}


def ensure_model(folder: Path, dtype: str = "bfloat16") -> Path:
    """Writes the checkpoint where it is not there yet: seeded normal weights of scale 0.02, a word-level tokenizer."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch

    write_without_weights(folder, {**CONFIG, "dtype": dtype})
    _save_weights(folder / "model.safetensors", getattr(torch, dtype))
    return folder


def write_without_weights(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint's folder for this config.json that lacks only its weights; every id from 3 on is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, config["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    return folder


def _save_weights(path: Path, dtype: object) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    c = CONFIG
    hidden, kv = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (c["intermediate_size"], hidden),
        "mlp.up_proj": (c["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, c["intermediate_size"]),
    }
    for layer in range(c["num_hidden_layers"]):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    save_file(tensors, str(path), metadata={"format": "pt"})
