"""Which body an operation runs on, decided by where its tensors lie."""

from torch import Tensor


def is_fused(tensor: Tensor) -> bool:
    """Triton's bodies are for CUDA. Call it through this module: a test may have them interpreted on a CPU."""
    return tensor.device.type == "cuda"
