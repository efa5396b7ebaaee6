"""What a device does at its best: operations and bytes a second, and memory; by datasheet, or measured on a CPU."""

import re
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
OTHER_FORMS = {"NVL", "PCIE"}
MOST_MEMORY = 1.15
"""A card has up to so many times the bytes of its name, whose gigabytes are rather binary ones."""


class UnknownDevice(Exception):
    """A device that is not known here; the message lists those that are."""


def device_named(name: str, dtype: str) -> Device:
    """`auto` is this machine's first GPU where its figures are known, else its CPU, whose name then says what GPU was
    seen. Raises UnknownDevice."""
    if name == "auto":
        return _installed(dtype)
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in GPUS:
        raise UnknownDevice(f"--device {name}: known are auto, cpu, {', '.join(GPUS)}")
    return GPUS[name]


def _installed(dtype: str) -> Device:
    card, memory_bytes = _first_gpu()
    known = known_gpu(card, memory_bytes)
    if known is not None:
        return known
    cpu = measure_cpu(dtype)
    if not card:
        return cpu
    seen = f"{cpu.name}, as the figures of its GPU ({card}, {memory_bytes / GIB:,.1f} GiB) are not known here"
    return msgspec.structs.replace(cpu, name=seen)


def _first_gpu() -> tuple[str, int]:
    """Its name and bytes of memory as nvidia-smi tells them; an empty name: none was seen."""
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10) if tool else None
    except (OSError, subprocess.TimeoutExpired):
        return "", 0
    if done is None or done.returncode:
        return "", 0
    name, _, mebibytes = done.stdout.partition("\n")[0].rpartition(",")
    return name.strip(), int(mebibytes) * 2**20 if mebibytes.strip().isdigit() else 0


def known_gpu(card: str, memory_bytes: int) -> Device | None:
    """The one of GPUS that nvidia-smi calls `card`, with the memory it has: neither an A100 of 40 GB nor an H100 NVL
    or PCIe, whose figures are others."""
    words = set(re.split(r"[^A-Z0-9]+", card.upper()))
    key = next((key for key in GPUS if key.upper() in words), None)
    if key is None or words & OTHER_FORMS or not 1 <= memory_bytes / GPUS[key].memory_bytes < MOST_MEMORY:
        return None
    return msgspec.structs.replace(GPUS[key], memory_bytes=memory_bytes)


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
