"""Block tables where attention reads them: by the rows of a step, [cache groups, rows, columns] int32.

A table is as wide as the longest context. Of many rows beside one long one, all tables together are megabytes, of which
a step changes a few numbers. So on a device they stay, by slot, and only what has changed goes down.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.worker.execute.slots import Slots
from services.worker.memory.copies import to_device

Array = np.ndarray


class Tables(Protocol):
    """Where the rows of a step get their tables."""

    def update(self) -> None:
        """Once a step's admissions and further blocks are in the slots, before anything reads them."""
        ...

    def of(self, rows: Array, longest: int) -> Tensor:
        """The tables of the slots `rows` int64 [n] for contexts of up to `longest` tokens, and some more columns. Good
        until the next step is begun."""
        ...


class HostTables:
    """Read from the slots, where the device is the host."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def update(self) -> None:
        pass

    def of(self, rows: Array, longest: int) -> Tensor:
        return torch.from_numpy(self._slots.tables(rows, longest))


class DeviceTables:
    """A copy of the slots' tables that follows them. `by_slot` int32 [cache groups, slots, columns], on the device: a
    captured graph may hold it."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self._slots = slots
        slots.note_table_changes()
        self.by_slot = torch.zeros(slots.block_table.shape, dtype=torch.int32, device=device)

    def update(self) -> None:
        places, blocks = self._slots.take_table_changes()
        if len(places):
            device = self.by_slot.device
            self.by_slot.view(-1).index_copy_(0, to_device(places, device), to_device(blocks, device))

    def of(self, rows: Array, longest: int) -> Tensor:
        columns = self._slots.table_columns(longest)
        return self.by_slot[:, :, :columns].index_select(1, to_device(rows, self.by_slot.device))
