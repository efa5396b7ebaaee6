import numpy as np
import pytest

from services.worker.execute.slots import Slots
from services.worker.plan import PlanError
from tests.builders.plans import make_admit, make_plan


def make_slots():
    slots = Slots(max_num_seqs=4, max_model_len=20, block_size=4, num_pool_blocks=10, vocab_size=100)
    slots.admit(make_admit(1, [7, 8, 9, 10, 11], computed=2, blocks=[6]))
    return slots


def test_an_admitted_request_stands_in_its_slot():
    slots = make_slots()
    assert slots.tokens[1, :5].tolist() == [7, 8, 9, 10, 11]
    assert (slots.known[1], slots.computed[1], slots.num_row_blocks[1], slots.block_table[0, 1, 0]) == (5, 2, 1, 6)


def test_blocks_are_appended_and_counts_advance_for_all_rows_at_once():
    slots = make_slots()
    slots.admit(make_admit(3, list(range(1, 10))))
    plan = make_plan(1, [(3, 6, False, (2, 9)), (1, 3, True, (4,))])
    slots.extend(plan)
    assert slots.block_table[0, 3, :2].tolist() == [2, 9]
    assert slots.block_table[0, 1, :2].tolist() == [6, 4]
    slots.advance(plan, np.array([42]))
    assert (slots.computed[[3, 1]].tolist(), slots.known[[3, 1]].tolist()) == ([6, 5], [9, 6])
    assert slots.tokens[1, 5] == 42
    plan = make_plan(2, [(1, 1, True, ()), (3, 3, True, (5,))])
    slots.extend(plan)
    assert slots.block_table[0, 3, :3].tolist() == [2, 9, 5]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("unknown_slot", [(0, 1, False, (1,))]),
        ("unknown_slot", [(60_000, 1, False, (1,))]),
        ("duplicate_slot", [(1, 1, False, ()), (1, 1, False, ())]),
        ("empty_row", [(1, 0, False, ())]),
        ("counts_beyond_known", [(1, 4, False, (2,))]),
        ("sample_before_end", [(1, 2, True, ())]),
        ("blocks_missing", [(1, 3, True, ())]),
        ("too_many_blocks", [(1, 3, True, (1, 2, 3, 4, 5))]),
        ("block_out_of_range", [(1, 3, True, (10,))]),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name_and_changes_nothing(name, rows):
    slots = make_slots()
    before = slots.block_table.copy(), slots.num_row_blocks.copy()
    with pytest.raises(PlanError, match=name) as refused:
        slots.extend(make_plan(1, rows))
    assert refused.value.name == name
    assert np.array_equal(slots.block_table, before[0])
    assert np.array_equal(slots.num_row_blocks, before[1])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("slot_out_of_range", {"slot": 4}),
        ("tokens_out_of_range", {"token_ids": []}),
        ("tokens_out_of_range", {"token_ids": [1] * 21}),
        ("prompt_out_of_range", {"prompt_len": 0}),
        ("prompt_out_of_range", {"prompt_len": 3}),
        ("computed_out_of_range", {"computed": 2, "blocks": [1]}),
        ("token_out_of_range", {"token_ids": [1, 100]}),
        ("token_out_of_range", {"token_ids": [1, -1]}),
        ("tables_do_not_fit", {"computed": 1}),
        ("tables_do_not_fit", {"tables": [(0, [1]), (0, [2])]}),
        ("blocks_do_not_fit", {"computed": 1, "tables": [(0, [])]}),
        ("blocks_do_not_fit", {"computed": 1, "tables": [(1, [3])]}),
        ("blocks_do_not_fit", {"blocks": [1] * 6}),
        ("block_out_of_range", {"blocks": [10]}),
    ],
)
def test_an_admission_that_does_not_fit_is_refused_by_name(name, fields):
    with pytest.raises(PlanError) as refused:
        make_slots().admit(make_admit(**({"slot": 2, "token_ids": [1, 2]} | fields)))
    assert refused.value.name == name


def test_each_cache_group_has_its_own_blocks_from_its_own_beginning():
    slots = Slots(max_num_seqs=4, max_model_len=40, block_size=4, num_pool_blocks=30, vocab_size=100, windows=(None, 5))
    slots.admit(make_admit(2, range(18), computed=16, tables=[(0, [1, 2, 3, 4]), (3, [9])]))
    slots.admit(make_admit(0, [1, 2, 3]))
    slots.extend(make_plan(1, [(0, 3, True, [[5], [6]]), (2, 2, True, [[7, 8], [11]])]))
    assert slots.block_table[:, 0, 0].tolist() == [5, 6]
    assert slots.block_table[0, 2, :6].tolist() == [1, 2, 3, 4, 7, 8]
    assert slots.block_table[1, 2, 3:5].tolist() == [9, 11]
    assert slots.num_row_blocks[[0, 2]].tolist() == [[1, 1], [6, 5]]
    assert slots.kv_slots(np.array([2, 0]), np.array([17, 1])).tolist() == [[29, 21], [45, 25]]
    tables = slots.tables(np.array([2, 0]), 18)
    assert tables.shape == (2, 2, 8) and tables.flags.c_contiguous
    with pytest.raises(PlanError, match="blocks_do_not_fit"):
        slots.admit(make_admit(1, range(18), computed=16, tables=[(0, [1, 2, 3, 4]), (4, [])]))
    with pytest.raises(PlanError, match="block_counts_do_not_fit"):
        slots.extend(make_plan(2, [(0, 1, True, (12,))]))


def test_a_reset_empties_every_slot():
    slots = make_slots()
    slots.reset()
    with pytest.raises(PlanError, match="unknown_slot"):
        slots.extend(make_plan(1, [(1, 1, False, (1,))]))


def test_the_last_position_may_sample_and_none_beyond_it_computes():
    slots = Slots(max_num_seqs=1, max_model_len=4, block_size=2, num_pool_blocks=4, vocab_size=9)
    slots.admit(make_admit(0, [1, 2, 3, 4]))
    plan = make_plan(1, [(0, 4, True, (0, 1))])
    slots.extend(plan)
    slots.advance(plan, np.array([5]))
    with pytest.raises(PlanError):
        slots.extend(make_plan(2, [(0, 1, True, (2,))]))
