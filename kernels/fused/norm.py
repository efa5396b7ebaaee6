"""Normalisations, one row per program, summed in float32; the residual's addition comes along."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused.launch import launch


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x, residual, weight, out, total, num_rows, eps,
    width: tl.constexpr, x_stride: tl.constexpr, block: tl.constexpr, rows_per_program: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, block)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for i in range(rows_per_program):
        row = tl.program_id(0).to(tl.int64) * rows_per_program + i
        mask = inside & (row < num_rows)
        values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            values += tl.load(residual + row * width + columns, mask=mask, other=0.0).to(tl.float32)
            rounded = values.to(out.dtype.element_ty)
            tl.store(total + row * width + columns, rounded, mask=mask)
            values = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
        tl.store(out + row * width + columns, (values * scale * gain).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, exact: bool = False) -> Tensor:
    """See kernels.ops.norm. Every row is computed alike, so `exact` changes nothing."""
    return _normalise(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, eps)


def _normalise(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if residual is not None else None
    block = triton.next_power_of_2(width)
    launch(
        _rms_norm_kernel,
        (len(rows),),
        {
            "x": rows,
            "residual": residual,
            "weight": weight,
            "out": out,
            "total": total,
            "num_rows": len(rows),
            "eps": eps,
        },
        {"width": width, "x_stride": rows.stride(0), "block": block, "rows_per_program": 1},
        num_warps=min(max(block // 512, 1), 8),
    )
    return out, out if total is None else total
