"""What a device does at its best: operations and bytes a second, and memory; by datasheet, or measured on a CPU."""

import shutil
import subprocess
import time
from collections.abc import Callable

import msgspec
import psutil

GIB = 2**30
MEASURED_SIZE = 1024
"""Rows and columns of the product that a CPU is measured with: large enough for its best, 2 · 1024³ operations."""
READ_BYTES = 2**28
REPEATS = 3


class Device(msgspec.Struct, frozen=True):
    """`flops` by dtype, dense, without sparsity; a CPU's memory is what is free."""

    name: str
    flops: dict[str, float]
    bytes_per_second: float
    memory_bytes: int
    how: str = "datasheet"


def _gpu(name: str, half: float, single: float, terabytes: float, gigabytes: int) -> Device:
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, flops, terabytes * 1e12, gigabytes * 10**9)


GPUS = {
    "a100": _gpu("NVIDIA A100 80GB", 312, 19.5, 2.039, 80),
    "h100": _gpu("NVIDIA H100 80GB", 989.4, 66.9, 3.35, 80),
    "h200": _gpu("NVIDIA H200", 989.4, 66.9, 4.8, 141),
    "b200": _gpu("NVIDIA B200", 2250, 75, 8.0, 180),
}
"""NVIDIA's datasheets, SXM modules."""


class UnknownDevice(Exception):
    """A device that is not known here; the message lists those that are."""


def device_named(name: str, dtype: str) -> Device:
    """`auto` is this machine's first GPU, else its CPU. Raises UnknownDevice."""
    if name == "auto":
        name = _installed_gpu() or "cpu"
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in GPUS:
        raise UnknownDevice(f"--device {name}: known are auto, cpu, {', '.join(GPUS)}")
    return GPUS[name]


def _installed_gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout if tool else ""
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((name for name in GPUS if name.upper() in listing.partition("\n")[0].upper()), None)


def measure_cpu(dtype: str) -> Device:
    """The best of a few products and of a few readings of memory, in about a second."""
    import torch

    square = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=getattr(torch, dtype))
    stretch = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    flops = 2 * MEASURED_SIZE**3 / _fastest(lambda: torch.mm(square, square))
    rate = READ_BYTES / _fastest(lambda: stretch.sum())
    return Device("this machine's CPU", {dtype: flops}, rate, psutil.virtual_memory().available, "measured")


def _fastest(call: Callable[[], object]) -> float:
    """Seconds."""
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
