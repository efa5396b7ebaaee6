"""The compiled forms that a model needs: its host functions called with meta tensors of its shapes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused import norm
from kernels.fused.launch import Form, recorded


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model fixes. Sizes in elements."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    qk_norm: bool = False
    block_size: int = 16
    max_model_len: int = 8192
    dtype: torch.dtype = torch.bfloat16

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


SHAPES = (
    ModelShape("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128_256),
    ModelShape("Qwen3-8B", 4096, 32, 8, 128, 12288, 151_936, qk_norm=True),
    ModelShape("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151_936, qk_norm=True),
)
"""What prove.py compiles."""


def forms_of(shape: ModelShape) -> list[Form]:
    """Every form that a step of this model may ask for, at any number of rows."""
    with recorded() as forms:
        for declare in DECLARATIONS:
            declare(shape)
    return forms


def _norms(shape: ModelShape) -> None:
    x, weight = shape.empty(2, shape.hidden), shape.empty(shape.hidden)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)


DECLARATIONS: tuple[Callable[[ModelShape], None], ...] = (_norms,)
