"""A step in the making: grants are added row by row, then sealed into a plan."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.scheduler.core.plan import Admission, StepPlan
from services.scheduler.core.request import Sample
from services.scheduler.core.worker_group import InFlight, WorkerGroup
from shared.sampling import NO_LOGPROBS

MOST_ADMITTED_TOKENS = 2**21
"""Known tokens that travel with one plan: 8 MiB of the 16 that a message to a worker may have. Only warm prefixes of
many long prompts at once come near it; the first admission of a step is always taken."""


@dataclass(slots=True)
class Step:
    """Rows so far. `prefill_budget` is what is left for rows of more than one token: every running sample's next
    token is set aside before, so that a long prompt never starves a decode.

    A row computes one token, samples one and gets no blocks, but for what is noted of it.
    """

    prefill_budget: int
    rows: list[Sample] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    """By row, where it is not one token."""
    unsampled: list[int] = field(default_factory=list)
    """Rows that sample none."""
    new_blocks: dict[int, Sequence[list[int]]] = field(default_factory=dict)
    """By row, where it gets some: one list for each cache group."""
    exact: bool = False
    admitted_tokens: int = 0

    def has_room_for(self, sample: Sample) -> bool:
        """Whether the plan can still carry the sample's known tokens."""
        return not self.admissions or self.admitted_tokens + len(sample.tokens) <= MOST_ADMITTED_TOKENS

    def cut(self, wanted: int) -> int:
        """How much of a prompt the step takes, out of the budget that nobody has a claim on."""
        count = min(wanted, self.prefill_budget)
        self.prefill_budget -= count
        return count

    def grant(self, sample: Sample, count: int, new_blocks: Sequence[list[int]] = ()) -> None:
        """Adds a row: the sample's next `count` tokens, after `new_blocks` were appended to its tables, if any were."""
        row = len(self.rows)
        if count != 1:
            self.counts[row] = count
        if new_blocks:
            self.new_blocks[row] = new_blocks
        sample.planned += count
        if sample.planned == sample.known:
            sample.known += 1
        else:
            self.unsampled.append(row)
        self.rows.append(sample)
        if sample.exact:
            self.exact = True

    def admit(self, sample: Sample, grammar: int) -> None:
        """Adds the sample's whole state; its row follows. `grammar` is the id of its grammar, 0 for none."""
        submission = sample.request.submission
        want_prompt = submission.want.prompt_logprobs if sample.wants_prompt_logprobs else NO_LOGPROBS
        self.admitted_tokens += len(sample.tokens)
        self.admissions.append(
            Admission(
                slot=sample.slot,
                token_ids=sample.tokens.tobytes(),
                prompt_len=sample.prompt_len,
                computed=sample.planned,
                tables=tuple((table.first, tuple(table.blocks)) for table in sample.tables),
                sample_index=sample.index,
                sampling=submission.sampling,
                min_tokens=submission.stopping.min_tokens,
                stop_token_ids=sample.stop_token_ids,
                logprobs=submission.want.logprobs,
                prompt_logprobs=want_prompt,
                trace=submission.trace,
                grammar=grammar,
            )
        )

    def seal(self, group: WorkerGroup) -> StepPlan:
        """The plan, now in flight on the group."""
        num_rows, num_groups = len(self.rows), len(group.cache)
        counts, samples = array("H", (1,)) * num_rows, bytearray(b"\1") * num_rows
        block_counts, blocks = array("H", (0,)) * (num_rows * num_groups), array("I")
        for row, count in self.counts.items():
            counts[row] = count
        for row in self.unsampled:
            samples[row] = 0
        for row, new_blocks in self.new_blocks.items():
            for place, some in enumerate(new_blocks, row * num_groups):
                block_counts[place] = len(some)
                blocks.extend(some)
        plan = StepPlan(
            step=group.next_step,
            exact=self.exact,
            admissions=tuple(self.admissions),
            slots=array("H", [sample.slot for sample in self.rows]),
            counts=counts,
            block_counts=block_counts,
            samples=bytes(samples),
            blocks=blocks,
        )
        group.next_step += 1
        group.in_flight.append(InFlight(plan, self.rows, self.pending))
        return plan
