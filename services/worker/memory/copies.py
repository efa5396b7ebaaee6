"""Between host and device: a step's inputs go down, its results come up, and neither waits for what is computed.

Both ways use pinned memory, for a copy from other memory waits for the stream. torch keeps freed pinned memory and
hands it out again only when the copies that used it are over, so inputs of the next step may be written while those of
this one are on their way: as many buffers take turns as are needed, which is two.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def to_device(array: Array, device: torch.device) -> Tensor:
    """The array's values as a tensor on `device`, behind what was launched before. On a CPU it is the array itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fill_from(target: Tensor, array: Array) -> None:
    """The array's values into `target`, of its shape and dtype, behind what was launched before."""
    tensor = torch.from_numpy(array)
    target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)


class Arrival:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    @property
    def is_here(self) -> bool:
        return True

    def wait(self) -> None:
        """Blocks until they have arrived. Any thread may call it."""

    def read(self) -> list[Array]:
        """Waits; the values, in order."""
        self.wait()
        return [tensor.numpy() for tensor in self._tensors]


class Copies(Protocol):
    """How results get to the host.

    `overlaps`: a step's values stay on the device until they are fetched, and its tokens feed the next step from there.
    """

    overlaps: bool

    def fetch(self, tensors: Sequence[Tensor]) -> Arrival:
        """Start to bring the tensors up, as they will be once all that was launched has run."""
        ...


class HostCopies:
    """Where the device is the host: what is launched has run."""

    overlaps = False

    def fetch(self, tensors: Sequence[Tensor]) -> Arrival:
        return Arrival(tensors)


class CudaArrival(Arrival):
    """Pinned tensors and the event behind the last copy; `sources` live until it has passed."""

    def __init__(self, tensors: Sequence[Tensor], sources: Sequence[Tensor], event: "torch.cuda.Event") -> None:
        super().__init__(tensors)
        self._sources, self._event = sources, event

    @property
    def is_here(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


class CudaCopies:
    """A stream of its own for what comes up, so that a result does not wait for the step that was launched behind it.

    Waiting is by a blocking event: a thread that waits leaves its core to the others.
    """

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def fetch(self, tensors: Sequence[Tensor]) -> Arrival:
        launched, arrived = torch.cuda.Event(), torch.cuda.Event(blocking=True)
        launched.record(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(launched)
            pinned = [_pinned_like(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
            arrived.record(self._stream)
        return CudaArrival(pinned, list(tensors), arrived)


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
