"""The device under measurement, and how its time is taken. On a CPU, for a dry run, the kernels are interpreted."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 20


@dataclass(frozen=True, slots=True)
class Device:
    """`dry`: toy sizes on a CPU, whose figures mean nothing."""

    name: str
    dry: bool

    def size(self, real: int, toy: int) -> int:
        return toy if self.dry else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=self.name) * scale).to(dtype)

    def num_sets(self, bytes_per_set: int) -> int:
        """How many input sets to rotate among, so that none is found in the cache: four times 60 MB of L2."""
        return 1 if self.dry else max(1, min(64, -(-240_000_000 // max(bytes_per_set, 1))))

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Gives back what earlier sections left to the allocator: another process wants the memory."""
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()

    def median_us(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median microseconds of one call; `calls` do the same on different inputs and are captured in one graph."""
        if self.dry:
            return self.eager_us(calls[0])
        for call in calls:
            call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return statistics.median(_replay_us(graph) for _ in range(REPEATS)) / len(calls)

    def eager_us(self, call: Callable[[], object], repeats: int = REPEATS) -> float:
        """Median microseconds of one call without a graph, its launches included; for what cannot be captured."""
        if not self.dry:
            call()
            self.synchronize()
        times = []
        for _ in range(1 if self.dry else repeats):
            begin = time.perf_counter()
            call()
            self.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)


def _replay_us(graph: "torch.cuda.CUDAGraph") -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def open_device(dry: bool) -> Device:
    """Raises SystemExit where there is no Triton, or no GPU and no dry run was asked for."""
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("error: triton is not installed; sh ops/scripts/setup test installs it on Linux")
    if not dry and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device; --dry-run goes through every section on a CPU")
    return Device("cpu" if dry else "cuda", dry)


def describe(device: Device) -> dict[str, object]:
    """What the figures were measured on."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton_version()}
    if device.dry:
        return {"device": "CPU, dry run: no figure means anything", **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver_version(),
        **versions,
    }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _driver_version() -> str:
    import subprocess

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
