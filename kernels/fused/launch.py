"""One way to start a kernel, which can also be recorded instead: what prove.py compiles is what the host functions ask
for, never a second list."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

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

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


_record: ContextVar[Callable[[Form], None] | None] = ContextVar("record", default=None)


def launch(
    kernel: Kernel,
    grid: Grid,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Start `kernel` on `grid`, or only note its form inside `recorded`. An empty grid starts nothing.

    `arguments` are tensors, None, ints and floats by parameter; `constants` the `tl.constexpr` ones.
    """
    record = _record.get()
    if record is not None:
        record(_form(kernel, arguments, constants, num_warps, num_stages))
    elif all(grid):
        kernel[grid](**arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False)


@contextmanager
def recorded() -> Iterator[list[Form]]:
    """The forms that host functions ask for in this block, each once; nothing is started. Call with meta tensors."""
    forms: dict[Form, None] = {}
    token = _record.set(lambda form: forms.setdefault(form))
    found: list[Form] = []
    try:
        yield found
    finally:
        _record.reset(token)
        found.extend(forms)


def _form(
    kernel: Kernel, arguments: Mapping[str, Any], constants: Mapping[str, Any], num_warps: int, num_stages: int
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
    )


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(tensor: Tensor) -> bool:
    start = tensor.storage_offset() * tensor.element_size() if tensor.is_meta else tensor.data_ptr()
    return start % ALIGNMENT == 0
