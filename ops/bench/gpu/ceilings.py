"""What the machine itself can do; every other figure is read beside these."""

import torch
import triton
import triton.language as tl

from ops.bench.gpu.device import Device

READERS, READ_BLOCK = 1056, 4096
"""Programs, eight for each multiprocessor of an H100, and how many elements each takes at a time."""


def measure(device: Device) -> dict[str, float]:
    """Copy and read bandwidth in GB/s and the better of both, cuBLAS in TFLOP/s on random data, microseconds per
    captured kernel."""
    copied, read = _copy(device), _read(device)
    return {
        "copy_gb_per_s": copied,
        "read_gb_per_s": read,
        "memory_gb_per_s": max(copied, read),
        "matmul_bf16_tflop_per_s": _matmul(device),
        "captured_kernel_us": _captured(device),
        "launched_kernel_us": _launched(device),
    }


def _copy(device: Device) -> float:
    """Bytes read and bytes written, of 4 GiB, by a kernel: cudaMemcpy within a GPU is slower."""
    source = device.randn(device.size(2**31, 2**10))
    target = torch.empty_like(source)
    return 2 * source.nbytes / device.median_us([lambda: torch.neg(source, out=target)]) / 1e3


@triton.jit
def _read_kernel(source, out, size, block: tl.constexpr) -> None:  # noqa: ANN001
    total = tl.zeros([block], tl.float32)
    for start in range(tl.program_id(0) * block, size, tl.num_programs(0) * block):
        total += tl.load(source + start + tl.arange(0, block)).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, axis=0))


def _read(device: Device) -> float:
    """2 GiB, by a kernel that does nothing else."""
    source = device.randn(device.size(2**30, 2 * READ_BLOCK))
    readers = device.size(READERS, 2)
    out = torch.empty(readers, dtype=torch.float32, device=source.device)

    def call() -> None:
        _read_kernel[(readers,)](source, out, source.numel(), READ_BLOCK, num_warps=8)

    return source.nbytes / device.median_us([call]) / 1e3


def _matmul(device: Device) -> float:
    size = device.size(8192, 32)
    left, right = device.randn(size, size), device.randn(size, size)
    out = torch.empty_like(left)
    return 2 * size**3 / device.median_us([lambda: torch.mm(left, right, out=out)]) / 1e6


def _captured(device: Device) -> float:
    """What one of 500 tiny kernels in a graph takes."""
    x = device.randn(128)
    return device.median_us([lambda: x.add_(1)] * device.size(500, 3))


def _launched(device: Device) -> float:
    """What one of 500 tiny kernels takes when each is launched from Python."""
    x, count = device.randn(128), device.size(500, 3)

    def launch_all() -> None:
        for _ in range(count):
            x.add_(1)

    return device.eager_us(launch_all) / count
