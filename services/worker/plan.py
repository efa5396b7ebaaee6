"""What a worker is told to do in a step and what it answers, as values. Torch-free."""

from typing import Protocol

import msgspec
import numpy as np
from llguidance import LLMatcher

from shared.sampling import NO_LOGPROBS, Sampling

Array = np.ndarray


class PlanError(Exception):
    """A plan that does not fit the worker's state. `name` says which rule it breaks."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class StepError(Exception):
    """A step that could not be finished; the message is short and goes to the scheduler."""


class DeviceLostError(Exception):
    """The device takes no more work from this process: only a new one helps."""


class BlockTable(msgspec.Struct, frozen=True):
    """Blocks (int32) of a sequence in one cache group, of which the first is block `first` of the sequence."""

    first: int
    blocks: Array


class Admit(msgspec.Struct, frozen=True, kw_only=True):
    """A request to take up, or to take up again. Replaces whatever the slot held.

    `token_ids` int32 [known], the prompt and then what was generated; `computed` of them stand in the blocks of
    `tables` already, one per cache group or none at all. `stop_token_ids` int64 are not sampled before `min_tokens`
    tokens were.
    `trace` names the request's span, 24 bytes, or is empty. `grammar` is what the answer must follow from its
    beginning; it is copied.
    """

    slot: int
    token_ids: Array
    prompt_len: int
    sampling: Sampling
    computed: int = 0
    tables: tuple[BlockTable, ...] = ()
    sample_index: int = 0
    min_tokens: int = 0
    stop_token_ids: Array = msgspec.field(default_factory=lambda: np.empty(0, np.int64))
    logprobs: int = NO_LOGPROBS
    prompt_logprobs: int = NO_LOGPROBS
    trace: bytes = b""
    grammar: LLMatcher | None = None


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step; see execution.proto. Row i is `slots[i]`, `counts[i]` (int64) and `samples[i]` (bool); `block_counts`
    int64 has an entry per row and cache group, and `blocks` int32 holds their further blocks one after another."""

    step: int
    slots: Array
    counts: Array
    block_counts: Array
    samples: Array
    blocks: Array
    admits: tuple[Admit, ...] = ()
    exact: bool = False


class RowLogprobs(msgspec.Struct, frozen=True):
    """Raw logprob and rank of the token sampled in one row, and the best alternatives (uint32 and float32 [k])."""

    row: int
    logprob: float
    rank: int
    top_ids: Array
    top_logprobs: Array


class RowPromptLogprobs(msgspec.Struct, frozen=True):
    """The same for prompt positions `start`, `start + 1`, …: float32 [n], uint32 [n], [n, k] and [n, k]."""

    row: int
    start: int
    logprobs: Array
    ranks: Array
    top_ids: Array
    top_logprobs: Array


NO_TOKENS: Array = np.empty(0, np.uint32)


class StepOutput(msgspec.Struct, frozen=True):
    """What a step brought forth: one token (uint32) per sampling row, in row order. `grammar_errors` name rows of the
    plan whose tokens mean nothing, and say why."""

    tokens: Array = NO_TOKENS
    logprobs: tuple[RowLogprobs, ...] = ()
    prompt_logprobs: tuple[RowPromptLogprobs, ...] = ()
    grammar_errors: tuple[tuple[int, str], ...] = ()


NO_OUTPUT = StepOutput()


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one plan. `error` is empty, or a short text and the output is void."""

    step: int
    output: StepOutput = NO_OUTPUT
    wait_ns: int = 0
    run_ns: int = 0
    error: str = ""


class PendingStep(Protocol):
    """A step that was begun: it may still be computing, and nobody has read what it brought forth."""

    @property
    def is_computed(self) -> bool:
        """Finishing it waits for nothing."""
        ...

    def wait(self) -> None:
        """Blocks until it is computed. Any thread may call it; errors are left to `finish`."""


class StepRunner(Protocol):
    """Whatever runs plans in order, on one thread.

    A step is begun, then finished. Where the device computes on its own the next step may be begun before this one is
    finished (at most MAX_BEGUN_STEPS at once); steps are finished in their order.
    """

    @property
    def layers_done(self) -> int:
        """Grows while a step runs; read from other threads."""
        ...

    @property
    def num_late_compilations(self) -> int:
        """Kernels that were compiled while a request waited."""
        ...

    def begin(self, plan: StepPlan) -> PendingStep:
        """Starts one step. Any exception means that it failed and that, once the steps begun before are finished, only
        `reset` may follow; after DeviceLostError not even that."""
        ...

    def finish(self, pending: PendingStep) -> StepOutput:
        """Waits for the step and reads it. Any exception means that it failed and that only `reset` may follow."""
        ...

    def run(self, plan: StepPlan) -> StepOutput:
        """Both, one after the other."""
        ...

    def reset(self) -> None:
        """Drops every slot and every step that was begun; keeps the pool."""


MAX_BEGUN_STEPS = 2
"""One that computes and one behind it: more would only add to the time that a new request waits."""


class ComputedStep(msgspec.Struct, frozen=True):
    """A step that was over when it had begun."""

    output: StepOutput

    @property
    def is_computed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class WholeStepRunner:
    """A runner that computes a step whole: what inherits it has `run`, `reset` and `layers_done` of its own."""

    num_late_compilations = 0

    def run(self, plan: StepPlan) -> StepOutput:
        raise NotImplementedError

    def begin(self, plan: StepPlan) -> ComputedStep:
        return ComputedStep(self.run(plan))

    def finish(self, pending: PendingStep) -> StepOutput:
        assert isinstance(pending, ComputedStep)
        return pending.output
