"""Activations of feed-forward layers, computed in float32 and rounded once.

- silu: x / (1 + e⁻ˣ); with a gate, SwiGLU (Shazeer, 2020)
- gelu: x Φ(x), by the error function (Hendrycks and Gimpel, 2016); with a gate, GeGLU
- gelu_tanh: its approximation by tanh, Hugging Face's gelu_new and gelu_pytorch_tanh
- relu, and relu_squared: max(x, 0)² (So et al., 2021)

Results are new and contiguous. With `exact`, an element's bits do not depend on where in the tensor it stands.
"""

from types import ModuleType
from typing import Literal, TypeAlias

from torch import Tensor

from kernels.cpu import activation as cpu
from kernels.ops import choice

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]


def _body(x: Tensor) -> ModuleType:
    if not choice.is_fused(x):
        return cpu
    from kernels.fused import activation as fused

    return fused


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u for gate_up = [g, u], [..., 2 * width] → [..., width]."""
    return _body(gate_up).silu_and_mul(gate_up, exact=exact)


def activate_and_mul(gate_up: Tensor, kind: Activation, *, exact: bool = False) -> Tensor:
    """y = act(g) * u for gate_up = [g, u], [..., 2 * width] → [..., width], the last dimension contiguous.

    The fused body raises ValueError for an odd last dimension, a strided one, or an unknown kind.
    """
    return _body(gate_up).activate_and_mul(gate_up, kind, exact=exact)


def activate(x: Tensor, kind: Activation, *, exact: bool = False) -> Tensor:
    """y = act(x), [..., width], the last dimension contiguous."""
    return _body(x).activate(x, kind, exact=exact)
