"""Compiles every declared form without a GPU and reports what it needs.

    python -m kernels.fused.prove [--target 80 89 90 100 120] [--model NAME] [--only KERNEL] [--json FILE]

Exits 1 when a form does not compile, or a hot kernel spills registers to memory.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.fused import attention, launch
from kernels.fused.declared import SHAPES, ModelShape, forms_of
from kernels.fused.launch import Form
from kernels.tuning import candidates

WARP_SIZE = 32
MAX_SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""What a block may ask for on A100, L40S, H100, B200 and RTX 5090 (CUDA programming guide, compute capabilities)."""
TARGETS = tuple(MAX_SHARED_BYTES)
SPILL, LARGE_SPILL, FLOAT32_SPILL, DESKTOP_SPILL = 8, 192, 64, 24
"""Bytes a thread that are tolerated: two registers, which a compiler parks where it could have had more; those of the
large tile of prompts; those of kernels of float32, which is taken for its exactness and never fast; and those on
sm_120."""
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Report:
    """One form on one target. `spilled_bytes` is the stack that a thread needs, 0 where nothing spills; `float32`: the
    model's dtype."""

    model: str
    kernel: str
    target: int
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    registers: int = 0
    shared_bytes: int = 0
    spilled_bytes: int = 0
    error: str = ""
    float32: bool = False

    @property
    def tolerated_spill(self) -> int:
        """Large tiles spill a little and are the fastest all the same, on an H200: prompts reach 446 TFLOP/s, the next
        best without a spill 420; exact products of 2,048 rows whose K is cut take 0.84 of the next best's time."""
        prompts = self.kernel == "_prefill_kernel" and self.constants.get("rows") == str(attention.LARGE_PROMPT.rows)
        tile = tuple(int(self.constants.get(name, 0)) for name in ("block_m", "block_n"))
        serial = self.constants.get("split", "1") != "1" and self.constants.get("spread") == "False"
        products = self.kernel == "_linear_kernel" and serial and tile == candidates.EXACT_LARGE_SPLIT[:2]
        usual = DESKTOP_SPILL if self.target == 120 else SPILL
        return LARGE_SPILL if prompts or products else FLOAT32_SPILL if self.float32 else usual

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.spilled_bytes > self.tolerated_spill:
            return f"spills {self.spilled_bytes} bytes a thread"
        limit = MAX_SHARED_BYTES[self.target]
        return f"{self.shared_bytes} bytes of shared memory, at most {limit}" if self.shared_bytes > limit else ""


def prove(model: str, form: Form, target: int, *, float32: bool = False) -> Report:
    """Compile one form; a failure is told in the report."""
    constants = {name: str(value) for name, value in form.constants}
    about = (model, form.name, target, constants, form.num_warps, form.num_stages)
    try:
        compiled = _compile(form, target)
    except Exception as error:
        return Report(*about, error=f"{type(error).__name__}: {error}"[:600])
    registers, stack, local = _usage(compiled.asm["cubin"])
    return Report(*about, registers, compiled.metadata.shared, stack + local, float32=float32)


def _compile(form: Form, target: int) -> triton.compiler.CompiledKernel:
    names = form.kernel.arg_names
    types = dict(form.types)
    source = ASTSource(
        fn=form.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in form.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in form.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, WARP_SIZE), options=form.options)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, stack bytes, local bytes) as NVIDIA's own tool reads them from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(told.stdout + told.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {told.stdout[:200]}{told.stderr[:200]}")
    registers, stack, _, local = map(int, found.groups())
    return registers, stack, local


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _prove_task(task: tuple[ModelShape, str, int]) -> list[Report]:
    shape, kernel, target = task
    float32 = shape.dtype == torch.float32
    return [prove(shape.name, form, target, float32=float32) for form in forms_on(shape, target) if form.name == kernel]


def forms_on(shape: ModelShape, target: int) -> list[Form]:
    """The forms that a device of this compute capability asks for."""
    before = launch.ASSUMED_CAPABILITY
    launch.ASSUMED_CAPABILITY = target
    try:
        return forms_of(shape)
    finally:
        launch.ASSUMED_CAPABILITY = before


def prove_all(shapes: Iterable[ModelShape], targets: Iterable[int], only: str | None = None) -> list[Report]:
    """Every declared form of the models on the targets, one task per kernel, on all cores."""
    tasks = [
        (shape, kernel, target)
        for shape in shapes
        for kernel in dict.fromkeys(form.name for form in forms_of(shape))
        for target in targets
        if only is None or only in kernel
    ]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        return [report for reports in workers.map(_prove_task, tasks) for report in reports]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=int, nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", nargs="+", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--only", help="kernels whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if not options.model or shape.name in options.model]
    reports = prove_all(shapes, options.target, options.only)
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    for report in reports:
        flags = " ".join(f"{name}={value}" for name, value in report.constants.items())
        print(
            f"sm_{report.target} {report.model:13} {report.kernel:28} regs {report.registers:3} "
            f"shared {report.shared_bytes:6} spilled {report.spilled_bytes:4} {flags[:110]} {report.problem[:400]}"
        )
    problems = [report for report in reports if report.problem]
    print(f"{len(reports)} forms compiled, {len(problems)} with problems")
    return 1 if problems or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
