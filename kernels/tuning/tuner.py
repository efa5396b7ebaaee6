"""Measures every candidate beside cuBLAS and keeps the fastest that is right. Knows no kernel: it is handed one.

A product is timed as a step runs it: inside a CUDA graph, over copies of the weight that together outgrow L2, so that
every launch reads its weight from memory. Candidates take turns, and each one's median counts.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kernels.tuning.candidates import BUCKETS, ITEM_BYTES, Config, Weight, candidates, exact
from kernels.tuning.table import Ceilings, Row

Compute: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, residual) → result."""
Run: TypeAlias = Callable[[int], object]
"""Starts one product; the number tells which copy of the inputs to read."""

L2_TIMES = 3
"""Copies of a weight hold so many times what L2 does."""
MAX_COPIES = 64
MIN_MICROSECONDS = 400.0
"""Work in a graph, at least."""
MAX_LAUNCHES = 128
ROUNDS = 7
TOLERANCE = 8e-3
"""Relative norm of the difference from cuBLAS: rounding to bfloat16, in a gate twice, makes up to 0.3 %."""


class Prepare(Protocol):
    def __call__(self, weight: Weight, config: Config | None, num_rows: int, *, exact: bool = False) -> Compute: ...


class Stopwatch(Protocol):
    def times(self, runs: Sequence[Run], launches: int) -> list[float]:
        """Microseconds of one run of each, taking turns."""


class Tuner:
    """`refused` gathers what was dropped: (weight, rows, configuration, reason)."""

    def __init__(
        self,
        prepare: Prepare,
        stopwatch: Stopwatch,
        ceilings: Ceilings,
        *,
        device: str = "cuda",
        l2_bytes: int = 50 * 2**20,
        shared_bytes: int = 227 * 1024,
    ) -> None:
        self._prepare, self._stopwatch, self._ceilings = prepare, stopwatch, ceilings
        self._device, self._l2_bytes, self._shared_bytes = device, l2_bytes, shared_bytes
        self.refused: list[tuple[Weight, int, Config, str]] = []

    def tune(self, weight: Weight, buckets: Sequence[int] = BUCKETS) -> Iterator[Row]:
        """One row per bucket, as each is measured."""
        weights = draw_weights(weight, self._l2_bytes, self._device)
        for bucket in buckets:
            yield self._measure(weight, bucket, weights)

    def _measure(self, weight: Weight, bucket: int, weights: list[Tensor]) -> Row:
        inputs = Inputs(weight, bucket, weights, self._device)
        library = self._prepare(weight, None, bucket)
        expected = inputs.compute(library)
        exactly = exact(weight, self._shared_bytes)
        right: list[tuple[Config | None, Compute]] = [(None, library)]
        for config in candidates(weight, bucket, self._shared_bytes):
            compute = self._checked(weight, config, bucket, inputs, expected)
            if compute is not None:
                right.append((config, compute))
        measured = [compute for _, compute in right]
        exact_compute = self._checked(weight, exactly, bucket, inputs, expected, exact=True)
        if exact_compute is not None:
            measured.append(exact_compute)
        floor = floor_microseconds(weight, bucket, self._ceilings)
        times = self._stopwatch.times([inputs.run(compute) for compute in measured], inputs.launches(floor))
        best = min(range(len(right)), key=times.__getitem__)
        return Row(
            op=weight.op,
            out_features=weight.out_features,
            in_features=weight.in_features,
            dtype=weight.dtype,
            rows=bucket,
            config=right[best][0],
            microseconds=round(times[best], 3),
            fraction=round(floor / times[best], 4),
            cublas_microseconds=round(times[0], 3),
            exact_microseconds=None if exact_compute is None else round(times[-1], 3),
            candidates=len(right),
        )

    def _checked(
        self, weight: Weight, config: Config, bucket: int, inputs: "Inputs", expected: Tensor, *, exact: bool = False
    ) -> Compute | None:
        """What computes by `config`, if it computes what cuBLAS does, twice the same."""
        try:
            compute = self._prepare(weight, config, bucket, exact=exact)
            first, second = inputs.compute(compute), inputs.compute(compute)
        except Exception as error:  # what does not compile or start here is no candidate here
            self.refused.append((weight, bucket, config, f"{type(error).__name__}: {error}"[:200]))
            return None
        problem = difference(first, expected) or ("" if torch.equal(first, second) else "not the same twice")
        if problem:
            self.refused.append((weight, bucket, config, problem))
        return None if problem else compute


class Inputs:
    """Copies of what a product reads."""

    def __init__(self, weight: Weight, num_rows: int, weights: list[Tensor], device: str) -> None:
        dtype = weights[0].dtype
        self._weights = weights
        self._x = torch.randn(num_rows, weight.in_features, device=device).to(dtype)
        self._residual: Tensor | None = None
        if weight.op == "linear_add":
            self._residual = torch.randn(num_rows, weight.out_features, device=device).to(dtype)

    def compute(self, compute: Compute) -> Tensor:
        return compute(self._x, self._weights[0], self._residual)

    def run(self, compute: Compute) -> Run:
        return lambda i: compute(self._x, self._weights[i % len(self._weights)], self._residual)

    def launches(self, floor: float) -> int:
        """Enough for the clock, and as often for one copy as for another."""
        copies = len(self._weights)
        wanted = min(MAX_LAUNCHES, math.ceil(MIN_MICROSECONDS / floor))
        return -(-max(wanted, 2) // copies) * copies


def draw_weights(weight: Weight, l2_bytes: int, device: str) -> list[Tensor]:
    """Copies that L2 cannot hold, of a scale that keeps results near 1."""
    copies = max(2, min(MAX_COPIES, math.ceil(L2_TIMES * l2_bytes / weight.bytes)))
    shape = (weight.halves * weight.out_features, weight.in_features)
    dtype = getattr(torch, weight.dtype)
    return [torch.randn(shape, device=device, dtype=dtype).mul_(weight.in_features**-0.5) for _ in range(copies)]


def floor_microseconds(weight: Weight, num_rows: int, ceilings: Ceilings) -> float:
    """What the machine needs to read the weight and the rows and write the result, or to multiply, if that is more."""
    results = weight.out_features * (2 if weight.op == "linear_add" else 1)
    moved = weight.bytes + num_rows * (weight.in_features + results) * ITEM_BYTES[weight.dtype]
    multiplied = 2 * num_rows * weight.halves * weight.out_features * weight.in_features
    return max(moved / ceilings.gigabytes_per_second / 1e3, multiplied / ceilings.teraflops / 1e6)


def difference(actual: Tensor, expected: Tensor) -> str:
    """What is wrong with a result; empty if it is right. Zeros, swapped rows and an error of 1 % are wrong."""
    if not bool(torch.isfinite(actual).all()):
        return "holds numbers that are not finite"
    wide = expected.float()
    error = float((actual.float() - wide).norm() / wide.norm())
    return f"differs from cuBLAS by {error:.1e}" if error > TOLERANCE else ""


class GraphStopwatch:
    """Times runs inside CUDA graphs, which share one pool of memory for what they make."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def times(self, runs: Sequence[Run], launches: int) -> list[float]:
        torch.cuda.empty_cache()  # what the graphs of the call before held
        pool = torch.cuda.graph_pool_handle()
        graphs = [self._capture(run, launches, pool) for run in runs]
        with torch.cuda.stream(self._stream):
            rounds = [[self._time(graph) / launches for graph in graphs] for _ in range(ROUNDS + 1)]
        return [statistics.median(one) for one in zip(*rounds[1:], strict=True)]

    def _capture(self, run: Run, launches: int, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            run(0)
            self._stream.synchronize()
            graph.capture_begin(pool=pool)
            try:
                for i in range(launches):
                    run(i)
            finally:
                graph.capture_end()
        return graph

    def _time(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def measure_ceilings(stopwatch: Stopwatch, device: str, *, megabytes: int = 2048, size: int = 8192) -> Ceilings:
    """What the machine copies and multiplies (bfloat16, by cuBLAS), for the fractions of a table."""
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    square = torch.randn(size, size, device=device).to(torch.bfloat16)
    [copying] = stopwatch.times([lambda i: torch.neg(source, out=target)], 4)  # a copy by cudaMemcpy is slower
    [multiplying] = stopwatch.times([lambda i: square @ square], 4)
    return Ceilings(round(2 * source.nbytes / copying / 1e3, 1), round(2 * size**3 / multiplying / 1e6, 1))
