"""One way to start a kernel, which can also be recorded instead: what prove.py compiles is what the host functions ask
for, never a second list.

A form can be compiled ahead of its first launch (`warm`), into the very cache that launches look it up in. What Triton
compiles after `seal` is counted as late: Triton itself tells of it, so that a launch costs nothing more.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor

log = logging.getLogger(__name__)

Kernel: TypeAlias = Any
"""A function under `triton.jit`; the interpreter's is of another class."""
Grid: TypeAlias = tuple[int, ...]

ALIGNMENT = 16
"""Bytes. Triton reads vectors through pointers that are a multiple of it."""
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


ASSUMED_CAPABILITY = 90
"""Where tensors lie on no GPU, and forms are only declared."""


def capability(device: torch.device) -> int:
    """Ten times the device's compute capability."""
    return _capability_of(device.index or 0) if device.type == "cuda" else ASSUMED_CAPABILITY


@functools.cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def next_power_of_2(n: int) -> int:
    """The least power of two from `n` on. Triton's own takes microseconds when it is called from the host."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many pieces of `size` hold `n`."""
    return -(-n // size)


@dataclass(frozen=True, slots=True)
class Form:
    """One compiled form of a kernel: all that its machine code depends on.

    `types` maps each parameter that is no constant to its Triton type; `aligned` names the pointers among them that are
    multiples of 16 bytes.
    """

    kernel: Kernel
    types: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool = False
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the arguments."""
        return _options(self.num_warps, self.num_stages, self.fp_fusion, self.max_registers)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


_record: ContextVar[Callable[[Form], None] | None] = ContextVar("record", default=None)
_observe: ContextVar[Callable[[Form], None] | None] = ContextVar("observe", default=None)


def launch(
    kernel: Kernel,
    grid: Grid,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    fp_fusion: bool = False,
    max_registers: int | None = None,
) -> None:
    """Start `kernel` on `grid`, or only note its form inside `recorded`. An empty grid starts nothing.

    `arguments` are tensors, None, ints and floats by parameter; `constants` the `tl.constexpr` ones. `fp_fusion` lets
    the compiler make one rounding of a product and a sum, where it likes to: not for kernels of which two forms must
    make the same bits. `max_registers` of a thread: how many programs share a multiprocessor follows from them.
    """
    options = _options(num_warps, num_stages, fp_fusion, max_registers)
    record = _record.get()
    if record is not None:
        record(_form(kernel, arguments, constants, num_warps, num_stages, fp_fusion, max_registers))
        return
    observe = _observe.get()
    if observe is not None:
        observe(_form(kernel, arguments, constants, num_warps, num_stages, fp_fusion, max_registers))
    if all(grid):
        _start(kernel, grid, arguments, constants, options)


class _Loaded:
    """A compiled form, and where each argument goes among its parameters."""

    def __init__(self, kernel: Kernel, compiled: Any, names: Iterable[str], constants: Mapping[str, Any]) -> None:
        self._compiled = compiled
        self._parameters = [constants.get(name) for name in kernel.arg_names]
        self._places = [kernel.arg_names.index(name) for name in names]

    def start(self, grid: Grid, values: Iterable[Any]) -> None:
        """`values` in the order of the arguments that it was made with, tensors as their addresses."""
        parameters = self._parameters.copy()
        for place, value in zip(self._places, values, strict=True):
            parameters[place] = value
        self._compiled[(*grid, 1, 1)[:3]](*parameters)


_loaded: dict[tuple[Any, ...], _Loaded] = {}
"""By all that the machine code depends on, and the device that holds it."""


def _start(
    kernel: Kernel,
    grid: Grid,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """What Triton found for these types, alignments and constants once is started at once the next time: its own
    search takes some 40 microseconds, and it asks the driver about every pointer."""
    device, kinds, values = -1, [], []
    for value in arguments.values():
        if isinstance(value, Tensor):
            address = value.data_ptr()
            kinds.append(value.dtype if address % ALIGNMENT == 0 else (value.dtype,))
            values.append(address)
            if device < 0:
                device = value.get_device()
        else:
            kinds.append(None if value is None else _type_of(value))
            values.append(value)
    key = (id(kernel), device, *options.values(), *arguments, *kinds, *constants, *constants.values())
    known = _loaded.get(key)
    if known is not None:
        known.start(grid, values)
        return
    compiled = kernel[grid](**arguments, **constants, **options)
    if isinstance(kernel, triton.JITFunction):
        _loaded[key] = _Loaded(kernel, compiled, arguments, constants)


@contextmanager
def recorded() -> Iterator[list[Form]]:
    """The forms that host functions ask for in this block, each once; nothing is started. Call with meta tensors."""
    with _collected(_record) as found:
        yield found


@contextmanager
def observed() -> Iterator[list[Form]]:
    """The same, of kernels that are started."""
    with _collected(_observe) as found:
        yield found


@contextmanager
def _collected(variable: ContextVar[Callable[[Form], None] | None]) -> Iterator[list[Form]]:
    forms: dict[Form, None] = {}
    token = variable.set(lambda form: forms.setdefault(form))
    found: list[Form] = []
    try:
        yield found
    finally:
        variable.reset(token)
        found.extend(forms)


class _Pointer:
    """Stands for a tensor where Triton looks for a dtype and an address."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


def stand_ins(form: Form) -> list[Any]:
    """Arguments in the order of the kernel's parameters that Triton compiles `form` for."""
    types, constants = dict(form.types), dict(form.constants)
    return [
        constants[name] if name in constants else _stand_in(types[name], name in form.aligned)
        for name in form.kernel.arg_names
    ]


def _stand_in(type_name: str, aligned: bool) -> Any:
    if type_name.startswith("*"):
        return _Pointer(DTYPES[type_name[1:]], 0 if aligned else ALIGNMENT // 2)
    return 0.5 if type_name == "fp32" else ALIGNMENT  # whole numbers are not specialised, so any stands for all


def warm(form: Form) -> None:
    """Compiles `form`, or takes it from Triton's cache on disk, and loads it: on the current CUDA device."""
    compiled = form.kernel.run(*stand_ins(form), grid=(1,), warmup=True, **form.options)
    if compiled is not None:
        compiled._init_handles()


class LateCompilations:
    """Counts, by kernel, what is compiled after `seal`: a request waited for it. The first of each kernel is logged."""

    def __init__(self) -> None:
        self.by_kernel: Counter[str] = Counter()
        self._sealed = False
        self._before: Any = None

    @property
    def total(self) -> int:
        return self.by_kernel.total()

    def seal(self) -> None:
        """From here on every compilation is late. Triton tells us of each, and whoever listened before as well."""
        if not self._sealed:
            self._sealed = True
            self._before = triton.knobs.runtime.jit_post_compile_hook
            triton.knobs.runtime.jit_post_compile_hook = self.on_compiled

    def on_compiled(self, *, fn: Any, is_manual_warmup: bool = False, **facts: Any) -> Any:
        if not is_manual_warmup:
            name = fn.name.rpartition(".")[2]
            self.by_kernel[name] += 1
            if self.by_kernel[name] == 1:
                log.warning("compiled %s in live traffic: %s", name, str(facts.get("repr", ""))[:400])
        if self._before is not None:
            return self._before(fn=fn, is_manual_warmup=is_manual_warmup, **facts)
        return None


late = LateCompilations()
"""This process's."""


def _options(num_warps: int, num_stages: int, fp_fusion: bool, max_registers: int | None) -> dict[str, Any]:
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    return options if max_registers is None else {**options, "maxnreg": max_registers}


def _form(
    kernel: Kernel,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    fp_fusion: bool,
    max_registers: int | None,
) -> Form:
    absent = {name: None for name, value in arguments.items() if value is None}
    present = {name: value for name, value in arguments.items() if value is not None}
    aligned = (name for name, value in present.items() if isinstance(value, Tensor) and _is_aligned(value))
    return Form(
        kernel,
        tuple((name, _type_of(value)) for name, value in present.items()),
        frozenset(aligned),
        (*constants.items(), *absent.items()),
        num_warps,
        num_stages,
        fp_fusion,
        max_registers,
    )


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{value} does not fit into the 32 bits that kernels are compiled for")
    return "i32"


def _is_aligned(tensor: Tensor) -> bool:
    start = tensor.storage_offset() * tensor.element_size() if tensor.is_meta else tensor.data_ptr()
    return start % ALIGNMENT == 0
