"""Which body an operation runs on, decided by where its tensors lie."""

from torch import Tensor

from kernels.cpu.choice import why_not_compiled

__all__ = ["is_fused", "why_not_compiled"]


def is_fused(tensor: Tensor) -> bool:
    """Triton's bodies are for CUDA. Call it through this module: a test may have them interpreted on a CPU."""
    return tensor.device.type == "cuda"
