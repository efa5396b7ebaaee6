"""What the machine itself can do; every other figure is read beside these."""

import torch

from ops.bench.gpu.device import Device


def measure(device: Device) -> dict[str, float]:
    """Copy and read bandwidth in GB/s, cuBLAS in TFLOP/s on random data, microseconds per captured kernel."""
    return {
        "copy_gb_per_s": _copy(device),
        "read_gb_per_s": _read(device),
        "matmul_bf16_tflop_per_s": _matmul(device),
        "captured_kernel_us": _captured(device),
        "launched_kernel_us": _launched(device),
    }


def _copy(device: Device) -> float:
    """Bytes read and bytes written, of 4 GiB."""
    source = device.randn(device.size(2**31, 2**10))
    target = torch.empty_like(source)
    return 2 * source.nbytes / device.median_us([lambda: target.copy_(source)]) / 1e3


def _read(device: Device) -> float:
    source = device.randn(device.size(2**31, 2**10))
    return source.nbytes / device.median_us([lambda: torch.amax(source)]) / 1e3


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
