"""Whether the compiled bodies can run here."""

import functools

import torch
from torch import Tensor


@functools.cache
def why_not_compiled() -> str:
    """Why torch's bodies take their place; empty where they run. They need numba, torch on an OpenMP library that goes
    by the name of GNU's, and a processor with fused multiply-add: without it a product is sixteen calls of a library.
    """
    try:
        from kernels.cpu.compiled import norm, threads

        if not threads.has_multiply_add():
            return "the processor has no fused multiply-add"
        one = torch.ones(1, 16, dtype=torch.bfloat16)
        right = bool((norm.rms_norm(one, one[0], 0.0) == 1).all())
    except Exception as error:  # whatever numba and LLVM may raise: there is another way
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return "" if right else "a compiled kernel computes wrong numbers"


def is_compiled(tensor: Tensor) -> bool:
    """They are for bfloat16. Call it through this module: a test may have torch's bodies everywhere."""
    return tensor.dtype == torch.bfloat16 and not why_not_compiled()
