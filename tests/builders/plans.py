"""Builders of step plans for workers' tests: as values, and as the messages a scheduler sends."""

from collections.abc import Sequence

import numpy as np

from services.worker.plan import Admit, BlockTable, StepPlan
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1 import scheduling_pb2
from shared.sampling import Sampling

GREEDY = Sampling(seed=0, temperature=0.0)


def make_admit(slot: int, token_ids: Sequence[int], **fields) -> Admit:
    """An Admit with plain lists; the prompt is all of `token_ids` unless `prompt_len` says otherwise. `tables` are
    (first block, blocks) of each cache group, `blocks` those of the only one."""
    fields.setdefault("prompt_len", len(token_ids))
    fields.setdefault("sampling", GREEDY)
    blocks = fields.pop("blocks", ())
    tables = fields.pop("tables", [(0, blocks)] if len(blocks) else ())
    fields["tables"] = tuple(BlockTable(first, np.asarray(blocks, np.int32)) for first, blocks in tables)
    fields["stop_token_ids"] = np.asarray(fields.get("stop_token_ids", ()), np.int64)
    return Admit(slot=slot, token_ids=np.asarray(token_ids, np.int32), **fields)


GROUP_BLOCKS = 20


def make_plan(
    step: int,
    rows: Sequence[tuple[int, int, bool, Sequence]] = (),
    admits: Sequence[Admit] = (),
    exact: bool = False,
    num_groups: int = 1,
) -> StepPlan:
    """A StepPlan; each row is (slot, count, samples, further blocks): those of the first cache group, the others' being
    GROUP_BLOCKS further on each, or lists of blocks, one for each group."""
    slots, counts, samples, further = zip(*rows, strict=True) if rows else ((), (), (), ())
    blocks = [each for row in further for each in _by_group(row, num_groups)]
    return StepPlan(
        step=step,
        exact=exact,
        admits=tuple(admits),
        slots=np.asarray(slots, np.int64),
        counts=np.asarray(counts, np.int64),
        block_counts=np.asarray([len(each) for each in blocks], np.int64),
        samples=np.asarray(samples, np.bool_),
        blocks=np.asarray([block for each in blocks for block in each], np.int32),
    )


def _by_group(blocks: Sequence, num_groups: int) -> list[list[int]]:
    if blocks and isinstance(blocks[0], list):
        return list(blocks)
    return [[block + GROUP_BLOCKS * group for block in blocks] for group in range(num_groups)]


def plan_message(plan: StepPlan) -> pb.ExecuteRequest:
    """The plan as the scheduler would send it."""
    return pb.ExecuteRequest(
        plan=pb.StepPlan(
            step=plan.step,
            exact=plan.exact,
            admits=[_admit_message(admit) for admit in plan.admits],
            slots=plan.slots.astype("<u2").tobytes(),
            counts=plan.counts.astype("<u2").tobytes(),
            block_counts=plan.block_counts.astype("<u2").tobytes(),
            samples=plan.samples.astype("<u1").tobytes(),
            blocks=plan.blocks.astype("<u4").tobytes(),
        )
    )


def _admit_message(admit: Admit) -> pb.Admit:
    sampling = {name: getattr(admit.sampling, name) for name in admit.sampling.__struct_fields__}
    sampling["logit_bias"] = dict(admit.sampling.logit_bias)
    return pb.Admit(
        slot=admit.slot,
        token_ids=admit.token_ids.astype("<u4").tobytes(),
        prompt_len=admit.prompt_len,
        computed=admit.computed,
        tables=[pb.BlockTable(first=each.first, blocks=each.blocks.astype("<u4").tobytes()) for each in admit.tables],
        sample_index=admit.sample_index,
        sampling=scheduling_pb2.RowSampling(**sampling),
        min_tokens=admit.min_tokens,
        stop_token_ids=admit.stop_token_ids.astype("<u4").tobytes(),
        logprobs=admit.logprobs,
        prompt_logprobs=admit.prompt_logprobs,
    )
