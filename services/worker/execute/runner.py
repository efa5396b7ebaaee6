"""Runs a plan: admit, gather, forward, sample; then read the tokens and write them back.

Where results stay on the device (`Copies.overlaps`) the two halves lie apart, and the next step begins between them:
it takes the tokens that nobody has read yet from `_last_tokens`, a tensor by slot. A step that was begun keeps all that
its reading needs, for by then its slots may be other requests'.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops.forms import num_late_compilations
from services.worker.execute.failures import explain
from services.worker.execute.graphs import Capture, DecodeForward, Graphs
from services.worker.execute.inputs import Gathered, Inputs, fed, gather_arrays, gather_decode, inputs_of, is_decode
from services.worker.execute.mixed_graphs import MixedGraphs
from services.worker.execute.slots import Placed, Slots
from services.worker.execute.tables import DeviceTables, HostTables
from services.worker.memory.copies import Arrival, Copies, HostCopies, to_device
from services.worker.models.decoder import StepBatch
from services.worker.plan import NO_OUTPUT, ComputedStep, PendingStep, StepOutput, StepPlan
from services.worker.sampling.sampler import DescribedPrompt, Sampled, Sampler

DESCRIBED_ROWS = 256
"""Prompt tokens whose logits are made together: of a whole step's they would fill gigabytes."""


class Forward(Protocol):
    """The part of a decoder that a runner needs."""

    layers_done: int

    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor: ...

    def hidden(self, batch: StepBatch, pool: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor, *, exact: bool) -> Tensor: ...


@dataclass(slots=True, eq=False)
class BegunStep:
    """A step that was launched. `output` or `error` is set once it has been read."""

    placed: Placed
    sampled: Sampled | None
    described: tuple[DescribedPrompt, ...]
    arrival: Arrival
    overlaps: bool
    output: StepOutput | None = None
    error: Exception | None = None

    @property
    def is_computed(self) -> bool:
        return not self.overlaps

    def wait(self) -> None:
        self.arrival.wait()


class Runner:
    """Owns slots, sampling state and the pages' contents. One thread calls it.

    After an exception its slots are in doubt: only `reset` may follow.
    """

    def __init__(
        self,
        decoder: Forward,
        pages: Tensor,
        slots: Slots,
        sampler: Sampler,
        *,
        deterministic: bool = False,
        copies: Copies | None = None,
    ) -> None:
        self._decoder = decoder
        self._pages = pages
        self._slots = slots
        self._sampler = sampler
        self._deterministic = deterministic
        self._copies = copies or HostCopies()
        self._last_tokens = torch.zeros(slots.max_num_seqs, dtype=torch.int64, device=pages.device)
        self._tables = DeviceTables(slots, pages.device) if self._copies.overlaps else HostTables(slots)
        self._begun: deque[BegunStep] = deque()
        self._graphs: Graphs | None = None
        self._mixed_graphs: MixedGraphs | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every step is."""
        return self._deterministic

    @property
    def vocab_size(self) -> int:
        return self._slots.vocab_size

    @property
    def layers_done(self) -> int:
        return self._decoder.layers_done

    @property
    def num_late_compilations(self) -> int:
        """Kernels that were compiled in live traffic, each while a step waited. Stays 0 on a CPU."""
        return num_late_compilations() if self._pages.is_cuda else 0

    def reset(self) -> None:
        self._begun.clear()
        self._slots.reset()

    def run(self, plan: StepPlan) -> StepOutput:
        """Raises PlanError for a plan that does not fit, StepError for logits that are not numbers."""
        return self.finish(self.begin(plan))

    def begin(self, plan: StepPlan) -> PendingStep:
        """Raises PlanError for a plan that does not fit, StepError out of memory, DeviceLostError, or what a step
        before has raised that had to be read first."""
        try:
            return self._begin(plan)
        except Exception as error:
            explained = explain(error)
            if explained is error:
                raise
            raise explained from error

    @torch.inference_mode()
    def _begin(self, plan: StepPlan) -> PendingStep:
        for admit in plan.admits:
            self._slots.admit(admit)
            self._sampler.admit(admit)
        self._slots.extend(plan)
        self._tables.update()
        if len(plan.slots) == 0:
            return ComputedStep(NO_OUTPUT)
        begun = self._launch(plan)
        self._begun.append(begun)
        return begun

    def finish(self, pending: PendingStep) -> StepOutput:
        """Raises StepError for logits that are not numbers, DeviceLostError."""
        if isinstance(pending, ComputedStep):
            return pending.output
        assert isinstance(pending, BegunStep)
        if pending.output is None and pending.error is None:
            self._read(pending)
        if pending.error is not None:
            raise pending.error
        assert pending.output is not None
        return pending.output

    def capture_graphs(self, decoder: DecodeForward, capture: Capture, *, max_num_tokens: int = 0) -> None:
        """From here on pure decode steps are replayed from graphs, and small ones with prompt tokens that are not exact
        where steps may have up to `max_num_tokens`. `decoder` is the runner's own."""
        slots, tables = self._slots, self._tables
        assert isinstance(tables, DeviceTables), "graphs are for devices that compute on their own"
        graphs = Graphs(
            decoder,
            self._pages,
            self._last_tokens,
            tables,
            capture,
            max_num_seqs=slots.max_num_seqs,
            max_model_len=slots.max_model_len,
            exact_only=self._deterministic,
        )
        graphs.capture_all()
        self._graphs = graphs
        if self._deterministic:
            return
        mixed = MixedGraphs(
            decoder,
            self._pages,
            self._last_tokens,
            tables,
            graphs.logits,
            capture,
            max_num_seqs=slots.max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=slots.max_model_len,
        )
        mixed.capture_all()
        self._mixed_graphs = mixed

    def _launch(self, plan: StepPlan) -> BegunStep:
        exact = plan.exact or self._deterministic
        logits = self._replay(plan, exact)
        described: tuple[DescribedPrompt, ...] = ()
        if logits is None:
            logits, described = self._forward(plan, exact)
        self._read_history(plan)
        sampled = self._sample(plan, logits)
        tensors = [tensor for each in (sampled, *described) if each is not None for tensor in each.tensors]
        return BegunStep(
            self._slots.place(plan), sampled, described, self._copies.fetch(tensors), self._copies.overlaps
        )

    def _replay(self, plan: StepPlan, exact: bool) -> Tensor | None:
        """The logits of the sampling rows from a graph, where one can hold the step."""
        if self._graphs is None or not is_decode(plan):
            return None
        return self._graphs.take(gather_decode(self._slots, plan), exact)

    def _forward(self, plan: StepPlan, exact: bool) -> tuple[Tensor, tuple[DescribedPrompt, ...]]:
        """The logits of the sampling rows, and what describes prompts."""
        gathered = gather_arrays(self._slots, plan, self._sampler.wants_prompt_logprobs(plan.slots))
        logits = None if exact or self._mixed_graphs is None else self._mixed_graphs.take(gathered)
        if logits is not None:
            return logits, ()
        return self._launch_forward(plan, gathered, exact)

    def _launch_forward(
        self, plan: StepPlan, gathered: Gathered, exact: bool
    ) -> tuple[Tensor, tuple[DescribedPrompt, ...]]:
        """The same, kernel by kernel."""
        inputs = inputs_of(gathered, self._tables, exact=exact, device=self._pages.device)
        batch = inputs.batch
        if inputs.feeds:
            batch = replace(batch, token_ids=fed(batch.token_ids, self._last_tokens))
        if not inputs.prompt_rows:
            return self._decoder.forward(batch, self._pages), ()
        hidden = self._decoder.hidden(batch, self._pages)
        described = self._describe_prompts(plan, inputs, hidden)
        sampled = hidden[to_device(inputs.sampled_at, hidden.device)]
        return self._decoder.logits(sampled, exact=exact), described

    def _sample(self, plan: StepPlan, logits: Tensor) -> Sampled | None:
        slots = plan.slots[plan.samples]
        if len(slots) == 0:
            return None
        sampled = self._sampler.sample(logits, slots, self._slots.known[slots], plan.samples.nonzero()[0])
        if self._copies.overlaps:
            self._last_tokens.index_copy_(0, to_device(slots, logits.device), sampled.token_ids)
        return sampled

    def _describe_prompts(self, plan: StepPlan, inputs: Inputs, hidden: Tensor) -> tuple[DescribedPrompt, ...]:
        described = []
        for row, first, end in inputs.prompt_rows:
            slot = int(plan.slots[row])
            start = int(self._slots.computed[slot]) + 1
            token_ids = self._slots.tokens[slot, start : start + end - first]
            pieces = hidden[first:end].split(DESCRIBED_ROWS)
            logits = (self._decoder.logits(piece, exact=inputs.batch.exact) for piece in pieces)
            described.append(self._sampler.describe_prompt(logits, slot, row, start, token_ids))
        return tuple(described)

    def _read_history(self, plan: StepPlan) -> None:
        """Reads every step that was begun, where a row samples by tokens that nobody has read yet: the device computes
        this step meanwhile. Raises the first one's error."""
        slots = plan.slots[plan.samples]
        if not (self._sampler.reads_history(slots) & (self._slots.unread[slots] > 0)).any():
            return
        while self._begun:
            begun = self._begun[0]
            self._read(begun)
            if begun.error is not None:
                raise begun.error

    def _read(self, begun: BegunStep) -> None:
        """Waits for the oldest step that was begun, and writes its tokens into the slots."""
        oldest = self._begun.popleft()
        assert begun is oldest, "steps are finished in their order"
        try:
            begun.output = self._output(begun)
        except Exception as error:
            begun.error = explain(error)

    def _output(self, begun: BegunStep) -> StepOutput:
        arrays = iter(begun.arrival.read())
        tokens, logprobs = NO_OUTPUT.tokens, NO_OUTPUT.logprobs
        if begun.sampled is not None:
            sampled, logprobs = begun.sampled.read([next(arrays) for _ in begun.sampled.tensors])
            self._slots.fill(begun.placed, sampled)
            tokens = sampled.astype("uint32")
        described = tuple(each.read([next(arrays) for _ in each.tensors]) for each in begun.described)
        errors = begun.sampled.grammar_errors if begun.sampled is not None else ()
        return StepOutput(tokens, logprobs, described, errors)
