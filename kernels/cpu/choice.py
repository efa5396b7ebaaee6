"""Whether the compiled bodies can run here."""

import functools

import torch
from torch import Tensor


@functools.cache
def can_compile() -> bool:
    """They need numba, and torch on an OpenMP library that goes by the name of GNU's."""
    try:
        from kernels.cpu.compiled import threads  # noqa: F401
    except (ImportError, OSError, AttributeError):
        return False
    return True


def is_compiled(tensor: Tensor) -> bool:
    """They are for bfloat16. Call it through this module: a test may have torch's bodies everywhere."""
    return tensor.dtype == torch.bfloat16 and can_compile()
