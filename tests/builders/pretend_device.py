"""A worker without tensors, driven by plans of the core: it models slots, block tables and the content of every block.

A block's slot holds its cache group and a digest of the token history it was computed from. Before a row samples, the
whole content that it would read in each group's window is compared with its own history: a block reused too early, a
hit on the wrong block or a hole shows at once. The token it "samples" depends on the whole history, so any two ways to
compute the same request must agree.
"""

import hashlib
from array import array
from dataclasses import dataclass, field

from services.scheduler.core.plan import Admission, StepPlan, StepResult
from shared.sampling import TokenLogprobs
from shared.structured import Structured

POISON = b"poison"


def digest(parent: bytes, token: int) -> bytes:
    return hashlib.blake2b(parent + token.to_bytes(4, "little"), digest_size=8).digest()


def history(tokens: "array | list[int]") -> list[bytes]:
    """The digest after each token."""
    digests, parent = [], b""
    for token in tokens:
        parent = digest(parent, token)
        digests.append(parent)
    return digests


def sample_token(state: bytes, seed: int, index: int, vocab: int) -> int:
    """The pretend model: a token in [0, vocab) from the history's digest."""
    text = state + seed.to_bytes(8, "little") + index.to_bytes(2, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % vocab


def generate(
    prompt: list[int], seed: int, index: int, vocab: int, max_new: int, stop: frozenset[int], min_tokens: int = 0
) -> list[int]:
    """What a request must answer, undisturbed and alone."""
    tokens, state = [], history(prompt)[-1]
    while len(tokens) < max_new:
        tokens.append(sample_token(state, seed, index, vocab))
        if tokens[-1] in stop and len(tokens) > min_tokens:
            break
        state = digest(state, tokens[-1])
    return tokens


@dataclass
class Row:
    admission: Admission
    tokens: list[int]
    digests: list[bytes]
    tables: list[dict[int, int]]
    """By cache group: place in the sequence → block."""
    ends: list[int]
    computed: int


@dataclass
class PretendDevice:
    """Raises AssertionError on a plan that no worker could run, or whose content would be wrong."""

    num_blocks: int
    block_size: int
    vocab: int = 50
    windows: tuple[int | None, ...] = (None,)
    slots: dict[int, Row] = field(default_factory=dict)
    grammars: dict[int, Structured] = field(default_factory=dict)
    """Those that were prepared, by id."""
    content: list[list[tuple[int, bytes]]] = field(init=False)
    last_step: int = 0
    seen_tokens: int = 0

    def __post_init__(self) -> None:
        self.content = [[(-1, POISON)] * self.block_size for _ in range(self.num_blocks)]

    def reset(self) -> None:
        self.slots.clear()
        self.grammars.clear()

    def arrive(self, plan: StepPlan) -> None:
        """The plan is read, behind what was told of grammars before it."""
        for admission in plan.admissions:
            if admission.grammar:
                told = self.grammars[admission.grammar].text
                assert told == str(admission.sampling.seed), "a sample is given its own grammar, once that is prepared"

    def run(self, plan: StepPlan, *, run_ns: int = 1_000_000) -> StepResult:
        assert plan.step > self.last_step, "steps run in order"
        self.last_step = plan.step
        for admission in plan.admissions:
            self._admit(admission)
        rows = [self.slots[slot] for slot in plan.slots]
        assert len(set(plan.slots)) == len(rows), "a slot has one row"
        blocks, added = iter(plan.blocks), iter(plan.block_counts)
        for row, count in zip(rows, plan.counts, strict=True):
            for group, table in enumerate(row.tables):
                new = next(added)
                table.update((row.ends[group] + i, next(blocks)) for i in range(new))
                row.ends[group] += new
            self._write(row, count)
        assert next(blocks, None) is None and next(added, None) is None, "every block belongs to a row and a group"
        tokens, prompt_logprobs = [], {}
        for i, (row, samples) in enumerate(zip(rows, plan.samples, strict=True)):
            self._check(row, plan.counts[i])
            if row.admission.prompt_logprobs >= 0:
                prompt_logprobs[i] = self._prompt_logprobs(row, plan.counts[i])
            if samples:
                tokens.append(self._sample(row))
            else:
                assert row.computed < len(row.tokens), "a row that reaches its last token samples"
        self.seen_tokens += sum(plan.counts)
        return StepResult(step=plan.step, tokens=tokens, prompt_logprobs=prompt_logprobs, run_ns=run_ns)

    def _admit(self, admission: Admission) -> None:
        tokens = list(array("I", admission.token_ids))
        assert 0 <= admission.computed < len(tokens)
        blocks = [block for _, blocks in admission.tables for block in blocks]
        assert all(0 <= block < self.num_blocks for block in blocks)
        assert len(set(blocks)) == len(blocks)
        assert len(admission.tables) == len(self.windows)
        tables = [dict(enumerate(blocks, first)) for first, blocks in admission.tables]
        ends = [first + len(blocks) for first, blocks in admission.tables]
        self.slots[admission.slot] = Row(admission, tokens, history(tokens), tables, ends, admission.computed)

    def _write(self, row: Row, count: int) -> None:
        assert count >= 1
        end = row.computed + count
        assert end <= len(row.tokens), "only known tokens are computed"
        for position in range(row.computed, end):
            for group, table in enumerate(row.tables):
                block = table[position // self.block_size]
                self.content[block][position % self.block_size] = group, row.digests[position]
        row.computed = end

    def _check(self, row: Row, count: int) -> None:
        for group, (window, table) in enumerate(zip(self.windows, row.tables, strict=True)):
            oldest = 0 if window is None else max(0, row.computed - count - window + 1)
            for position in range(oldest, row.computed):
                found = self.content[table[position // self.block_size]][position % self.block_size]
                assert found == (group, row.digests[position]), f"position {position} reads what another request wrote"

    def _prompt_logprobs(self, row: Row, count: int) -> tuple[int, tuple[TokenLogprobs, ...]]:
        """Of the prompt tokens that this chunk predicts; the rank tells which token was meant."""
        start = row.computed - count + 1
        described = row.tokens[start : min(row.computed + 1, row.admission.prompt_len)]
        return start, tuple(TokenLogprobs(-1.0, token) for token in described)

    def _sample(self, row: Row) -> int:
        assert row.computed == len(row.tokens)
        admission = row.admission
        token = sample_token(row.digests[-1], admission.sampling.seed, admission.sample_index, self.vocab)
        row.tokens.append(token)
        row.digests.append(digest(row.digests[-1], token))
        return token
