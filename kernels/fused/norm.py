"""Normalisations, summed in float32; the residual's addition comes along.

A program holds whole rows: one of a wide model, or as many short ones (the heads of q and k) as fill its threads. Tile
and warps follow from the width alone, so a row is summed in the same order however many rows there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import cdiv, launch, next_power_of_2

SHORT = 256
"""Rows up to this width share a program: a warp then sums a whole row without shared memory."""
TILE = 2048
"""Elements of a program that holds several rows."""
PER_THREAD = 16
"""Elements of a thread: two loads of 16 bytes in bfloat16."""
MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x, residual, weight, bias, out, total, num_rows, eps,
    width: tl.constexpr, inner: tl.constexpr, x_outer: tl.constexpr, x_inner: tl.constexpr,
    residual_stride: tl.constexpr, centre: tl.constexpr, plus_one: tl.constexpr,
    rows_per_program: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows_per_program + tl.arange(0, rows_per_program)[:, None]
    column = tl.arange(0, block)[None, :]
    inside = column < width
    mask = inside & (row < num_rows)
    if weight is not None:  # on their way before the sums, which everything waits for
        gain = tl.load(weight + column, mask=inside, other=0.0)
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0)
    values = tl.load(x + row // inner * x_outer + row % inner * x_inner + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    if centre:
        values = tl.where(inside, values - tl.sum(values, axis=1, keep_dims=True) / width, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / width + eps)
    if weight is not None:
        values *= gain.to(tl.float32) + 1.0 if plus_one else gain.to(tl.float32)
    if bias is not None:
        values += shift.to(tl.float32)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False) -> Tensor:
    """See kernels.ops.norm. Every row is computed alike, so `exact` changes nothing, here and below."""
    return _normalise(x, None, weight, None, eps, plus_one=plus_one)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, None, eps, plus_one=plus_one)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False) -> Tensor:
    return _normalise(x, None, weight, bias, eps, centre=True)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, bias, eps, centre=True)


def _normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool = False,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """(normed, x + residual), both contiguous; without a residual the second is the first."""
    _check(x, residual, weight, bias)
    width = x.shape[-1]
    rows, added = _rows(x), None if residual is None else residual.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    num_rows = x.numel() // width
    rows_per_program, block, num_warps = _tile(width)
    launch(
        _norm_kernel,
        (cdiv(num_rows, rows_per_program),),
        {
            "x": rows.tensor,
            "residual": added,
            "weight": weight,
            "bias": bias,
            "out": out,
            "total": total,
            "num_rows": num_rows,
            "eps": eps,
        },
        {
            "width": width,
            "inner": rows.inner,
            "x_outer": rows.outer_stride,
            "x_inner": rows.inner_stride,
            "residual_stride": 0 if added is None else added.stride(0),
            "centre": centre,
            "plus_one": plus_one,
            "rows_per_program": rows_per_program,
            "block": block,
        },
        num_warps=num_warps,
    )
    return out, out if total is None else total


class _Rows(NamedTuple):
    """Row i of `tensor` starts at i // inner * outer_stride + i % inner * inner_stride."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


def _rows(x: Tensor) -> _Rows:
    """Heads of a view into a wider projection are read where they lie. Only strides decide, never the number of
    tokens, which would ask for another compiled form."""
    if x.ndim > 3:
        x = x.flatten(0, -3)
    if x.ndim == 3 and x.stride(0) != x.shape[1] * x.stride(1):
        return _Rows(x, x.shape[1], x.stride(0), x.stride(1))
    return _Rows(x, 1, x.stride(-2) if x.ndim > 1 else x.shape[0], 0)


def _tile(width: int) -> tuple[int, int, int]:
    """(rows of a program, columns, warps)."""
    block = next_power_of_2(width)
    rows_per_program = TILE // block if block <= SHORT else 1
    return rows_per_program, block, min(max(rows_per_program * block // (PER_THREAD * 32), 1), MAX_WARPS)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    width = x.shape[-1] if x.ndim else 0
    if width == 0 or (width > 1 and x.stride(-1) != 1):
        raise ValueError(f"x must have a contiguous last dimension, not {tuple(x.shape)} by {x.stride()}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.shape != (width,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be [{width}], contiguous, not {tuple(tensor.shape)}")
