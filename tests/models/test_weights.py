"""Where the tensors of a checkpoint are put."""

import torch

from services.worker.models import weights
from services.worker.models.registry import translate
from shared.checkpoint import open_checkpoint
from tests.models.twins import make_twin


def test_tensors_go_from_the_file_to_the_device_and_are_joined_there(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(weights, "_check_finite", lambda tensor, header: checked.append(tensor.device.type))
    checkpoint = open_checkpoint(make_twin("llama", tmp_path))
    family = translate(checkpoint.config)
    prefix = "model.layers.0.self_attn."
    with weights.CheckpointWeights(checkpoint, family, torch.bfloat16, device="meta") as source:
        lone, joined = source.take("model.norm.weight"), source.take(f"{prefix}q_proj.weight", f"{prefix}k_proj.weight")
    assert {lone.device.type, joined.device.type, *checked} == {"meta"}
    assert lone.dtype == joined.dtype == torch.bfloat16
    heads = family.spec.num_heads + family.spec.num_kv_heads
    assert joined.shape == (heads * family.spec.head_dim, family.spec.hidden_size)
