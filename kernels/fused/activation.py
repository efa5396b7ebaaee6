"""Activations and their gates, in float32: a program takes some columns of one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch, next_power_of_2

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
BLOCK = 2048
"""Columns of a program where they divide the width; half of them waste less where they do not."""
PER_THREAD = 16
"""Elements of a thread: two loads of 16 bytes in bfloat16, and two of the gated half."""


@triton.jit
def _activated(x, kind: tl.constexpr):
    if kind == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif kind == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == "gelu_tanh":  # (1 + tanh z) / 2 = 1 / (1 + e^-2z)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        if kind == "relu_squared":
            y *= y
    return y


@triton.jit
def _activation_kernel(
    x, out, width: tl.constexpr, stride: tl.constexpr, kind: tl.constexpr, gated: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if gated:
        up = tl.load(x + row * stride + width + column, mask=inside, other=0.0)
        result = _activated(values.to(tl.float32), kind) * up.to(tl.float32)
    else:
        result = _activated(values.to(tl.float32), kind)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """See kernels.ops.activation. Every element is computed alike, so `exact` changes nothing, here and below."""
    return activate_and_mul(gate_up, "silu")


def activate_and_mul(gate_up: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"a gate and its other half must be equally wide; {list(gate_up.shape)}")
    return _activate(gate_up, kind, gate_up.shape[-1] // 2, gated=True)


def activate(x: Tensor, kind: str, *, exact: bool = False) -> Tensor:
    return _activate(x, kind, x.shape[-1] if x.ndim else 0, gated=False)


def _activate(x: Tensor, kind: str, width: int, *, gated: bool) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(KINDS)}")
    if width == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(f"the last dimension must be contiguous and not empty: {list(x.shape)} by {x.stride()}")
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    block = BLOCK if width % BLOCK == 0 else min(next_power_of_2(width), BLOCK // 2)
    launch(
        _activation_kernel,
        (len(rows), cdiv(width, block)),
        {"x": rows, "out": out},
        {"width": width, "stride": rows.stride(0), "kind": kind, "gated": gated, "block": block},
        num_warps=max(block // (PER_THREAD * 32), 1),
    )
    return out
