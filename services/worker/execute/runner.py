"""Runs a plan: admit, gather, forward, sample, write the tokens back."""

from typing import Protocol

import torch
from torch import Tensor

from services.worker.execute.inputs import Inputs, gather
from services.worker.execute.slots import Slots
from services.worker.models.decoder import StepBatch
from services.worker.plan import NO_OUTPUT, RowPromptLogprobs, StepOutput, StepPlan
from services.worker.sampling.sampler import Sampler


class Forward(Protocol):
    """The part of a decoder that a runner needs."""

    layers_done: int

    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor: ...


class Runner:
    """Owns slots, sampling state and the pages' contents. One thread calls it.

    After an exception its slots are in doubt: only `reset` may follow.
    """

    def __init__(
        self, decoder: Forward, pages: Tensor, slots: Slots, sampler: Sampler, *, deterministic: bool = False
    ) -> None:
        self._decoder = decoder
        self._pages = pages
        self._slots = slots
        self._sampler = sampler
        self._deterministic = deterministic

    @property
    def vocab_size(self) -> int:
        return self._slots.vocab_size

    @property
    def layers_done(self) -> int:
        return self._decoder.layers_done

    def reset(self) -> None:
        self._slots.reset()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Raises PlanError for a plan that does not fit, StepError for logits that are not numbers."""
        for admit in plan.admits:
            self._slots.admit(admit)
            self._sampler.admit(admit)
        self._slots.extend(plan)
        if len(plan.slots) == 0:
            return NO_OUTPUT
        describes_prompt = self._sampler.wants_prompt_logprobs(plan.slots)
        inputs = gather(self._slots, plan, describes_prompt, exact=plan.exact or self._deterministic)
        logits = self._decoder.forward(inputs.batch, self._pages)
        prompt_logprobs = self._describe_prompts(plan, inputs, logits)
        output = self._sample(plan, inputs, logits, prompt_logprobs)
        self._slots.advance(plan, output.tokens)
        return output

    def _sample(
        self, plan: StepPlan, inputs: Inputs, logits: Tensor, prompt_logprobs: tuple[RowPromptLogprobs, ...]
    ) -> StepOutput:
        slots = plan.slots[plan.samples]
        if len(slots) == 0:
            return StepOutput(prompt_logprobs=prompt_logprobs)
        if len(logits) != len(slots):
            logits = logits[torch.from_numpy(inputs.sampled_at).to(logits.device)]
        rows = plan.samples.nonzero()[0]
        tokens, logprobs = self._sampler.sample(logits, slots, self._slots.known[slots], rows)
        return StepOutput(tokens.astype("uint32"), logprobs, prompt_logprobs)

    def _describe_prompts(self, plan: StepPlan, inputs: Inputs, logits: Tensor) -> tuple[RowPromptLogprobs, ...]:
        described = []
        for row, first, end in inputs.prompt_rows:
            slot = int(plan.slots[row])
            start = int(self._slots.computed[slot]) + 1
            token_ids = self._slots.tokens[slot, start : start + end - first]
            described.append(self._sampler.prompt_logprobs(logits[first:end], slot, row, start, token_ids))
        return tuple(described)
