"""Compiling before there is traffic: the forms that a model's steps may ask for, and a count of those that came late.

For GPUs only: a CPU has nothing to compile ahead of time here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from kernels.ops.linear import PackedGate, PackedLinear

if TYPE_CHECKING:
    from kernels.fused.launch import Form

Products: TypeAlias = "Sequence[tuple[str, PackedLinear | PackedGate]]"
"""A model's weights, each with the function of kernels.ops.linear that uses it; one of each shape will do."""


def forms(products: Products, **shape: Any) -> list["Form"]:
    """Every form of a model; `shape` are the fields of kernels.fused.declared.ModelShape."""
    from kernels.fused import declared

    return declared.forms_with(declared.ModelShape(**shape), products)  # type: ignore[arg-type]


def warm(products: Products, **shape: Any) -> int:
    """Compiles or fetches from disk every form of a model, and loads it. Returns how many there are."""
    from kernels.fused import launch

    found = forms(products, **shape)
    for form in found:
        launch.warm(form)
    return len(found)


def seal() -> None:
    """From here on a compilation is late."""
    from kernels.fused.launch import late

    late.seal()


def table_verdicts() -> dict[str, int]:
    """How many tables of products were of another Triton version and used, and how many were refused."""
    from kernels.fused.linear import TABLES

    return {"other_triton": TABLES.other_triton, "refused": TABLES.refused}


def num_late_compilations() -> int:
    """Since `seal`; each made a step wait."""
    from kernels.fused.launch import late

    return late.total
