"""Plans and results: plain data. A seeded workload replays to identical plans."""

from array import array
from collections.abc import Mapping, Sequence

import msgspec

from shared.sampling import Sampling, TokenLogprobs


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """A sample takes a slot: everything the worker needs to begin it, or to begin it again after a preemption."""

    slot: int
    token_ids: bytes
    """All known tokens, uint32 little-endian: the prompt, then what was generated."""
    prompt_len: int
    computed: int
    """Tokens whose K and V stand in the blocks already (a prefix hit)."""
    tables: tuple[tuple[int, tuple[int, ...]], ...]
    """By cache group: which block of its sequence the first one is, and the blocks from there on."""
    sample_index: int
    sampling: Sampling
    min_tokens: int
    stop_token_ids: frozenset[int]
    logprobs: int
    prompt_logprobs: int
    trace: bytes = b""
    grammar: int = 0
    """The id of a grammar that the worker has prepared; 0: none."""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one worker group. The arrays have one entry per row, `block_counts` one per row and cache group;
    `blocks` holds, row after row and group after group, the blocks that are appended to block tables before it runs."""

    step: int
    exact: bool
    admissions: tuple[Admission, ...]
    slots: array  # 'H'
    counts: array  # 'H', tokens to compute
    block_counts: array  # 'H'
    samples: bytes  # 1 where the row samples one token
    blocks: array  # 'I'

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker answers. `tokens` has one entry per sampling row, in row order; the maps are keyed by row."""

    step: int
    tokens: Sequence[int] = ()
    logprobs: Mapping[int, TokenLogprobs] = {}
    prompt_logprobs: Mapping[int, tuple[int, tuple[TokenLogprobs, ...]]] = {}
    wait_ns: int = 0
    run_ns: int = 0
    error: str = ""
    grammar_errors: Mapping[int, str] = {}
    """Why rows cannot go on; the tokens of these rows mean nothing."""
