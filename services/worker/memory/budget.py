"""How many bytes of a GPU the KV pool may take: what `--gpu-memory-utilization` allows, less what all else needs.

What steps need is measured, by torch's own statistics, while a worst case runs (services/worker/rehearsal.py).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import torch

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
UNSHARED = {"expandable_segments:true": "expandable segments", "backend:cudamallocasync": "memory of cudaMallocAsync"}
GRAPH_BYTES = 8 * 2**20
"""What the driver keeps for one captured graph, beside its buffers: some 300 nodes. To be measured on a GPU."""


class Memory(msgspec.Struct, frozen=True):
    """Bytes of a device: free for anybody, and in all."""

    free: int
    total: int


class Gauge(Protocol):
    """What is read of a device's memory."""

    def memory(self) -> Memory:
        """Once everything that torch only keeps has been given back."""
        ...

    def peak_of(self, function: Callable[[], None]) -> int:
        """The bytes that the function's tensors took at their most, beyond what was there before."""
        ...


class CudaGauge:
    """By torch.cuda, on the current device."""

    def memory(self) -> Memory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return Memory(free=free, total=total)

    def peak_of(self, function: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def pool_bytes(memory: Memory, utilization: float, needed: int) -> int:
    """Bytes for the KV pool; 0 or less where the rest leaves none.

    `memory` as it is with the weights in place: what others and this process hold counts against the share that this
    worker may take, so two workers on one GPU are given half of it each.
    """
    held = memory.total - memory.free
    return int(memory.total * utilization) - held - needed


def refuse_allocator(environ: Mapping[str, str]) -> str:
    """Why this process's allocator cannot hold the pool, or nothing.

    A pool must be one allocation of cudaMalloc: another process can open such memory (cudaIpcGetMemHandle), no other.
    """
    for name in ALLOCATOR_VARIABLES:
        settings = {part.strip().lower() for part in environ.get(name, "").split(",")}
        for setting, what in UNSHARED.items():
            if setting in settings:
                return (
                    f"{name}={environ[name]}: {what} cannot be shared between processes, and the KV pool must be: take "
                    f"{setting.partition(':')[0]} out of it"
                )
    return ""
