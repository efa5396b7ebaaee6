"""How each slot samples, as arrays by slot, and the sampling of one step's rows: first what is launched, then, once its
tensors are on the host, what is read.

The order: raw logprobs, logit bias, penalties, min_tokens, grammar, then kernels.ops.sampling.sample (temperature,
top-k, top-p, min-p, noise). Rows that ask for nothing pay for nothing: a plain greedy step is one argmax.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.ops import sampling as ops
from services.worker.memory.copies import to_device
from services.worker.plan import Admit, PlanError, RowLogprobs, RowPromptLogprobs, StepError
from services.worker.sampling.guide import Guide, Masks
from services.worker.sampling.history import TokenCounts
from shared.sampling import NO_LOGPROBS, Sampling

Array = np.ndarray

PROMPT_CHUNK_ELEMENTS = 2**22
"""Logits looked at together for prompt logprobs."""


@dataclass(slots=True, frozen=True)
class _Adjustments:
    """What changes the logits of one slot before temperature."""

    bias_ids: Array
    bias: Array
    stop_token_ids: Array
    counts: TokenCounts | None
    repetition: float
    presence: float
    frequency: float


@dataclass(slots=True, frozen=True)
class Sampled:
    """What was launched for the n sampling rows of a step, and all that is needed to read it: by then its slots may be
    others'.

    `tensors`, where the logits lie: token ids int64 [n], highest logits float32 [n] and, where rows ask for logprobs,
    what `token_logprobs` gives for these. `asking`: their numbers in the plan; `num_top`: alternatives each wants.
    `counts`: for rows whose penalties count tokens, which of the n, and the counts. `guides`: for rows with a grammar,
    which of the n, and where they stand. `grammar_errors`: numbers in the plan of rows whose tokens mean nothing, and
    why.
    """

    tensors: tuple[Tensor, ...]
    asking: Array
    num_top: Array
    counts: tuple[tuple[int, TokenCounts], ...] = ()
    guides: tuple[tuple[int, Guide], ...] = ()
    grammar_errors: tuple[tuple[int, str], ...] = ()

    @property
    def token_ids(self) -> Tensor:
        return self.tensors[0]

    def read(self, arrays: Sequence[Array]) -> tuple[Array, tuple[RowLogprobs, ...]]:
        """The tokens (int64 [n]) and the logprobs asked for, from the tensors' values; counts tokens for penalties, and
        takes grammars on.

        Raises StepError where a row's logits held NaN or infinities.
        """
        token_ids, values = arrays[:2]
        _check_finite(values)
        for index, counts in self.counts:
            counts.add(int(token_ids[index]))
        for index, guide in self.guides:
            guide.accept(int(token_ids[index]))
        return token_ids, self._logprobs(arrays[2:])

    def _logprobs(self, arrays: Sequence[Array]) -> tuple[RowLogprobs, ...]:
        if not arrays:
            return ()
        logprobs, ranks, top_ids, top_logprobs = arrays
        columns = (self.asking.tolist(), logprobs.tolist(), ranks.tolist(), self.num_top.tolist())
        return tuple(
            RowLogprobs(row, logprob, rank, top_ids[i, :top].astype(np.uint32), top_logprobs[i, :top])
            for i, (row, logprob, rank, top) in enumerate(zip(*columns, strict=True))
        )


@dataclass(slots=True, frozen=True)
class DescribedPrompt:
    """What was launched for the prompt positions `start`, … of one row; `tensors` as `token_logprobs` gives them."""

    tensors: tuple[Tensor, ...]
    row: int
    start: int

    def read(self, arrays: Sequence[Array]) -> RowPromptLogprobs:
        """From the tensors' values. Raises StepError as `Sampled.read` does."""
        logprobs, ranks, top_ids, top_logprobs = arrays
        _check_finite(logprobs)
        ids, numbers = top_ids.astype(np.uint32), ranks.astype(np.uint32)
        return RowPromptLogprobs(self.row, self.start, logprobs, numbers, ids, top_logprobs)


class Sampler:
    """Owned by the runner; used on the device thread only. Rebuilt for a slot at each admission, from known tokens."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, masks: Masks) -> None:
        self.vocab_size = vocab_size
        self._masks = masks
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._filtered = np.zeros(max_num_seqs, np.bool_)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._sample_index = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self._num_prompt_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self._first_stop = np.zeros(max_num_seqs, np.int64)  # the first position at which a stop token may stand
        self._adjusted = np.zeros(max_num_seqs, np.bool_)
        self._counted = np.zeros(max_num_seqs, np.bool_)  # those of the adjusted whose penalties count tokens
        self._guided = np.zeros(max_num_seqs, np.bool_)
        self._plain = np.ones(max_num_seqs, np.bool_)  # greedy, nothing else
        self._adjustments: dict[int, _Adjustments] = {}
        self._guides: dict[int, Guide] = {}

    def admit(self, admit: Admit) -> None:
        """Takes over how the slot samples. Raises PlanError for values that no sampler can use."""
        sampling, slot = admit.sampling, admit.slot
        _check(sampling, admit)
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k if 0 < sampling.top_k < self.vocab_size else 0
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._filtered[slot] = self._top_k[slot] > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self._seed[slot] = sampling.seed
        self._sample_index[slot] = admit.sample_index
        self._num_logprobs[slot] = min(admit.logprobs, self.vocab_size)
        self._num_prompt_logprobs[slot] = min(admit.prompt_logprobs, self.vocab_size)
        adjustments = self._adjustments_of(admit)
        self._adjusted[slot] = adjustments is not None
        self._counted[slot] = adjustments is not None and adjustments.counts is not None
        if adjustments is not None:
            self._adjustments[slot] = adjustments
        else:
            self._adjustments.pop(slot, None)
        self._first_stop[slot] = admit.prompt_len + admit.min_tokens
        self._guided[slot] = admit.grammar is not None
        if admit.grammar is not None:
            self._guides[slot] = Guide(admit.grammar, admit.token_ids[admit.prompt_len :])
        else:
            self._guides.pop(slot, None)
        is_bare = adjustments is None and admit.grammar is None
        self._plain[slot] = sampling.temperature == 0 and is_bare and admit.logprobs == NO_LOGPROBS

    def _adjustments_of(self, admit: Admit) -> _Adjustments | None:
        sampling, vocab_size = admit.sampling, self.vocab_size
        stops = np.unique(admit.stop_token_ids[admit.stop_token_ids < vocab_size]) if admit.min_tokens else _NO_IDS
        if len(stops) == vocab_size:  # min_tokens cannot be kept where every token stops
            stops = _NO_IDS
        bias = [(token_id, value) for token_id, value in sampling.logit_bias if token_id < vocab_size]
        counts = None
        if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0):
            prompt, output = np.split(admit.token_ids, [admit.prompt_len])
            counts = TokenCounts(prompt, output, vocab_size, with_prompt=sampling.repetition_penalty != 1.0)
        if counts is None and not bias and len(stops) == 0:
            return None
        return _Adjustments(
            bias_ids=np.asarray([token_id for token_id, _ in bias], np.int64),
            bias=np.asarray([value for _, value in bias], np.float32),
            stop_token_ids=stops,
            counts=counts,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )

    def wants_prompt_logprobs(self, slots: Array) -> Array:
        """Which of the slots do, bool."""
        return self._num_prompt_logprobs[slots] != NO_LOGPROBS

    def reads_history(self, slots: Array) -> Array:
        """Which of the slots sample by the tokens before, bool: these must have been read when `sample` is called."""
        return self._counted[slots] | self._guided[slots]

    def sample(self, logits: Tensor, slots: Array, positions: Array, rows: Array) -> Sampled:
        """Launches the draw of one token per row of `logits` [n, vocab], which it may overwrite.

        `slots`, `positions` (where the tokens will stand) and `rows` (their numbers in the plan) are int64 [n].
        """
        if self._plain[slots].all():
            return Sampled(ops.best(logits), _NO_IDS, _NO_IDS)
        asking = np.flatnonzero(self._num_logprobs[slots] != NO_LOGPROBS)
        adjusted = np.flatnonzero(self._adjusted[slots])
        at = None if len(asking) in (0, len(slots)) else _beside(logits, asking)
        guides = tuple(self._guides_of(slots))
        raw = logits
        if len(asking) and (at is not None or len(adjusted) or guides):
            raw = logits.clone() if at is None else logits[at]
        self._adjust(logits, slots[adjusted], positions[adjusted], adjusted)
        if guides:
            self._restrict(logits, guides)
        tensors: tuple[Tensor, ...] = self._draw(logits, slots, positions)
        num_top = self._num_logprobs[slots[asking]]
        if len(asking):
            drawn = tensors[0] if at is None else tensors[0][at]
            tensors += ops.token_logprobs(raw, drawn, int(num_top.max()))
        errors = tuple((int(rows[index]), guide.error) for index, guide in guides if guide.error)
        return Sampled(tensors, rows[asking], num_top, tuple(self._counts_of(slots)), guides, errors)

    def _draw(self, logits: Tensor, slots: Array, positions: Array) -> tuple[Tensor, Tensor]:
        keys = ops.noise_keys(*(_beside(logits, each) for each in self._noise_counters(slots, positions)))
        filters = (self._top_k, self._top_p, self._min_p)
        filtered = self._filtered[slots].any()
        top_k, top_p, min_p = (_beside(logits, each[slots]) if filtered else None for each in filters)
        token_ids, values = ops.sample(logits, keys, _beside(logits, self._temperature[slots]), top_k, top_p, min_p)
        if values.device.type == "cpu":  # at hand, and logprobs on a CPU stumble over what is no number
            _check_finite(values.numpy())
        return token_ids, values

    def _counts_of(self, slots: Array) -> Iterator[tuple[int, TokenCounts]]:
        for index in np.flatnonzero(self._counted[slots]).tolist():
            counts = self._adjustments[int(slots[index])].counts
            assert counts is not None
            yield index, counts

    def _guides_of(self, slots: Array) -> Iterator[tuple[int, Guide]]:
        for index in np.flatnonzero(self._guided[slots]).tolist():
            yield index, self._guides[int(slots[index])]

    def _restrict(self, logits: Tensor, guides: Sequence[tuple[int, Guide]]) -> None:
        """Leaves the rows that have guides what these allow."""
        at = np.array([index for index, _ in guides])
        allowed = self._masks.allowed([guide for _, guide in guides])
        ops.restrict(logits, _beside(logits, at), _beside(logits, allowed))

    def _noise_counters(self, slots: Array, positions: Array) -> tuple[Array, Array, Array]:
        return self._seed[slots].view(np.int64), self._sample_index[slots], positions

    def _adjust(self, logits: Tensor, slots: Array, positions: Array, at: Array) -> None:
        """Bias, penalties and min_tokens for the rows `at` of `logits`, each kind in one operation."""
        if len(slots) == 0:
            return
        chosen = [self._adjustments[slot] for slot in slots.tolist()]
        bias = [(row, each.bias_ids, each.bias) for row, each in zip(at, chosen, strict=True) if len(each.bias)]
        if bias:
            ops.add_bias(logits, *_entries(logits, bias), _joined(logits, [values for _, _, values in bias]))
        penalized = [(row, each) for row, each in zip(at, chosen, strict=True) if each.counts is not None]
        if penalized:
            _penalize(logits, penalized)
        early = positions < self._first_stop[slots]
        stops = [
            (row, each.stop_token_ids)
            for row, each, masked in zip(at, chosen, early, strict=True)
            if masked and len(each.stop_token_ids)
        ]
        if stops:
            ops.forbid(logits, *_entries(logits, stops))

    def describe_prompt(
        self, pieces: Iterable[Tensor], slot: int, row: int, start: int, token_ids: Array
    ) -> DescribedPrompt:
        """Launches the logprobs of the prompt tokens `token_ids` int32 [n] at positions `start`, …, whose logits are
        the rows of all `pieces` [m, vocab]; only one of these is held at a time."""
        num_top, parts, done = int(self._num_prompt_logprobs[slot]), [], 0
        chunk = max(4, PROMPT_CHUNK_ELEMENTS // self.vocab_size // 4 * 4)  # so that each begins well placed too
        for piece in pieces:
            logits, targets = _well_placed(piece), token_ids[done : done + len(piece)].astype(np.int64)
            done += len(piece)
            wanted = _beside(logits, targets)
            parts += [
                ops.token_logprobs(logits[at : at + chunk], wanted[at : at + chunk], num_top)
                for at in range(0, len(logits), chunk)
            ]
            del logits, piece
        return DescribedPrompt(tuple(torch.cat(each) for each in zip(*parts, strict=True)), row, start)


_NO_IDS: Array = np.empty(0, np.int64)


def _check(sampling: Sampling, admit: Admit) -> None:
    floats = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        *(value for _, value in sampling.logit_bias),
    )
    fits = sampling.temperature >= 0 and sampling.top_p >= 0 and 0 <= sampling.min_p <= 1
    if not (np.isfinite(floats).all() and fits and sampling.repetition_penalty > 0):
        raise PlanError("sampling_out_of_range", f"slot {admit.slot}: {sampling}")


def _check_finite(values: Array) -> None:
    bad = len(values) - np.count_nonzero(np.isfinite(values))
    if bad:
        raise StepError(f"{bad} of {len(values)} rows have NaN or infinite logits")


def _penalize(logits: Tensor, penalized: list[tuple[int, _Adjustments]]) -> None:
    counted = [(row, each, each.counts) for row, each in penalized if each.counts is not None]
    sizes = [len(counts.token_ids) for _, _, counts in counted]
    per_row = np.asarray([(each.repetition, each.presence, each.frequency) for _, each, _ in counted], np.float32)
    factors = (_beside(logits, np.repeat(column, sizes)) for column in per_row.T)
    rows, token_ids = _entries(logits, [(row, counts.token_ids) for row, _, counts in counted])
    ops.penalize(logits, rows, token_ids, _joined(logits, [counts.output_counts for _, _, counts in counted]), *factors)


def _entries(logits: Tensor, per_row: list[tuple]) -> tuple[Tensor, Tensor]:
    """Row numbers and ids, one entry after another."""
    ids = [entry[1] for entry in per_row]
    rows = np.repeat(np.asarray([entry[0] for entry in per_row], np.int64), [len(each) for each in ids])
    return _beside(logits, rows), _joined(logits, ids)


def _joined(logits: Tensor, arrays: list[Array]) -> Tensor:
    return _beside(logits, np.concatenate(arrays))


def _well_placed(logits: Tensor) -> Tensor:
    """Rows of a GPU's tensor that begin where vectors are read from: for others Triton would compile anew."""
    starts_well = logits.storage_offset() * logits.element_size() % 16 == 0
    return logits if starts_well or not logits.is_cuda else logits.clone()


def _beside(logits: Tensor, array: Array) -> Tensor:
    """An array as a tensor where the logits lie."""
    return to_device(array, logits.device)
