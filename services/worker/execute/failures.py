"""What an exception out of a GPU step means: the step's own failure, or the end of this process's CUDA context."""

import torch

from services.worker.plan import DeviceLostError, StepError

CUDA_NAMES = ("CUDA", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")
MEMORY_NAMES = ("out of memory", "ALLOC_FAILED")


def explain(error: Exception) -> Exception:
    """The error as the device thread understands it.

    Out of memory is the step's failure: torch frees what it allocated, and the next epoch may go on. Any other error of
    CUDA sticks to the context: every later call fails too, so only a new process helps. What is not CUDA's stays as it
    is.
    """
    told = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return StepError(f"out of GPU memory: {told}")
    is_cuda = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(name in told for name in CUDA_NAMES)
    )
    if not is_cuda:
        return error
    if any(name in told for name in MEMORY_NAMES):
        return StepError(f"out of GPU memory: {told}")
    return DeviceLostError(f"{type(error).__name__}: {told}")
