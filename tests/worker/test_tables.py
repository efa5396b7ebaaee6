"""Block tables that stay on a device: they follow the slots', step by step, by what has changed alone."""

import random

import numpy as np
import pytest
import torch

from services.worker.execute import tables
from services.worker.execute.slots import Slots
from services.worker.execute.tables import DeviceTables, HostTables
from tests.builders.plans import make_admit, make_plan

SIZES = {"max_num_seqs": 5, "max_model_len": 60, "block_size": 4, "num_pool_blocks": 90, "vocab_size": 100}
CPU = torch.device("cpu")


def read(of, rows, longest):
    """What attention may read: the columns of each context."""
    found = of.of(np.array(rows), longest)
    assert found.dtype == torch.int32
    return found[:, :, : -(-longest // 4)].tolist()


@pytest.mark.parametrize("windows", [(None,), (None, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_they_are_those_of_the_slots_through_admissions_growth_and_resets(windows, seed):
    rng = random.Random(seed)
    slots = Slots(**SIZES, windows=windows)
    held, host = DeviceTables(slots, CPU), HostTables(slots)
    computed: dict[int, int] = {}
    for step in range(60):
        if rng.random() < 0.05:
            slots.reset()
            computed.clear()
        admits, rows = [], []
        for slot in range(5):
            if rng.random() < 0.3 or computed.get(slot, 60) + 1 >= 60:
                computed[slot] = -rng.randint(1, 30)  # a prompt, nothing of it computed
                admits.append(make_admit(slot, [1] * -computed[slot]))
            count = max(1, -computed[slot])
            end = max(0, computed[slot]) + count
            before = -(-max(0, computed[slot]) // 4)
            blocks = [rng.randrange(90) for _ in range(-(-end // 4) - before)]
            rows.append((slot, count, True, [blocks] * len(windows)))
            computed[slot] = end
        for admit in admits:
            slots.admit(admit)
        plan = make_plan(step, rows, admits, num_groups=len(windows))
        slots.extend(plan)
        held.update()
        asked = rng.sample(range(5), 3)
        longest = max(computed[slot] for slot in asked)
        together = zip(read(held, asked, longest), read(host, asked, longest), strict=True)
        for mine, theirs in together:
            for row, slot in enumerate(asked):
                blocks = -(-computed[slot] // 4)
                assert mine[row][:blocks] == theirs[row][:blocks]
        slots.advance(plan, np.full(5, 7))


def test_only_what_has_changed_goes_down(monkeypatch):
    slots, sent = Slots(**SIZES), []
    held = DeviceTables(slots, CPU)
    send = tables.to_device
    monkeypatch.setattr(tables, "to_device", lambda array, device: sent.append(len(array)) or send(array, device))
    slots.admit(make_admit(2, range(8)))
    slots.extend(make_plan(1, [(2, 8, True, (5, 6))], [make_admit(2, range(8))]))
    held.update()
    held.update()
    assert sent == [2, 2]
    assert held.by_slot[0, 2, :2].tolist() == [5, 6]


def test_slots_keep_no_changes_that_nobody_takes():
    slots = Slots(**SIZES)
    slots.admit(make_admit(2, range(8)))
    slots.extend(make_plan(1, [(2, 8, True, (5, 6))]))
    assert slots._changes is None
