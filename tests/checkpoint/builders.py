"""Writes small checkpoints without torch."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 8}


def write_checkpoint(folder: Path, *, shards: int = 1, tensors: int = 4, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    named = {f"tensor.{index}": np.full((3, index + 1), index, dtype=np.float32) for index in range(tensors)}
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(named)}
    for shard in set(weight_map.values()):
        save_file({name: named[name] for name in named if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
