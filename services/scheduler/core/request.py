"""A request and its samples: a few counters, everything else derived from them."""

import enum
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from services.scheduler.core.events import RequestKey, SampleName
from services.scheduler.core.groups import BlockTable
from services.scheduler.core.phases import Ledger, Phase
from shared.outcome import Refusal
from shared.prefix import BlockHash
from shared.sampling import Sampling, Stopping, TokenLogprobs, Want
from shared.structured import Structured


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What arrives: one prompt, `n` samples of it. `deadline_ns` is a point of the core's clock, 0 for none."""

    key: RequestKey
    token_ids: tuple[int, ...] | array
    sampling: Sampling
    stopping: Stopping = Stopping()
    want: Want = Want()
    n: int = 1
    priority: int = 0
    deterministic: bool = False
    deadline_ns: int = 0
    salt: bytes = b""
    structured: Structured | None = None
    trace: bytes = b""
    """Opaque: passed on to the worker."""


@enum.unique
class Status(enum.Enum):
    """Where a sample stands. Legal transitions are in TRANSITIONS."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.ENDED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.ENDED}),
    Status.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Request:
    """What the samples of one prompt have in common."""

    submission: Submission
    order: tuple[float, int]
    """The policy's key: smaller runs first, and is preempted last."""
    max_len: int
    """Known tokens at which a sample ends with LENGTH."""
    root: BlockHash
    ledger: Ledger
    samples: list["Sample"] = field(default_factory=list)
    cached_tokens: int | None = None
    """Of the prompt, as the first sample to be admitted found it; None until then."""
    refusal: Refusal | None = None

    @property
    def key(self) -> RequestKey:
        return self.submission.key

    @property
    def num_live(self) -> int:
        return sum(sample.status is not Status.ENDED for sample in self.samples)

    @property
    def completion_tokens(self) -> int:
        return sum(sample.num_generated for sample in self.samples)

    def account(self) -> None:
        """Brings the ledger up to date; to be called before it is settled."""
        for sample in self.samples:
            sample.account()


@dataclass(slots=True, eq=False)
class Sample:
    """One answer in the making.

    A step moves `planned` (and, once applied, `computed`) towards `known`: [0, computed) stand in the cache, [computed,
    planned) are in flight, [planned, known) wait for a grant. The last `unknown` of them are still to be sampled by
    plans in flight; `tokens` are the others.

    From its first token on, most rows of a sample are alike: one more token, and nothing else to do. `plain_end` and
    `plain_known` say how long that lasts, so that these rows, most of all, cost little.
    """

    request: Request
    index: int
    name: SampleName
    tokens: array
    prompt_len: int
    max_len: int
    stop_token_ids: frozenset[int]
    exact: bool
    wants_prompt_logprobs: bool
    """They were asked for, and are not sent yet."""
    tells_plain: bool
    """Its tokens go out alone: no logprobs, and no grammar that may end it."""
    known: int
    status: Status = Status.WAITING
    group_id: str = ""
    backlog: int = 0
    """Tokens that were neither computed nor warm when it last entered a queue; fixed while it stays there."""
    slot: int = -1
    tables: list[BlockTable] = field(default_factory=list)
    """By cache group; none while it waits."""
    provided: int = 0
    """The last position at which a step may end without a change to the tables."""
    hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as computed until now."""
    num_indexed: int = 0
    """Leading blocks that were offered to the prefix index."""
    planned: int = 0
    computed: int = 0
    plain_end: int = 0
    """A step of one token that ends before this position changes no tables; 0: look closely."""
    plain_known: int = 0
    """A token sampled while fewer than so many are known fills no block and ends nothing by length; 0: look closely."""
    accounted: int = 0
    """Leading tokens that the request's ledger knows of."""
    phase: Phase = Phase.QUEUE
    incarnation: int = 0
    """Counts admissions that were undone."""
    failures: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def unknown(self) -> int:
        return self.known - len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def structured(self) -> Structured | None:
        return self.request.submission.structured

    @property
    def order(self) -> tuple[float, int, int]:
        return (*self.request.order, self.index)

    def move(self, status: Status) -> None:
        """Raises ValueError on a transition that TRANSITIONS does not list."""
        if status not in TRANSITIONS[self.status]:
            raise ValueError(f"sample {self.request.key}/{self.index}: {self.status.value} → {status.value}")
        self.status = status

    def look_ahead(self, block_size: int) -> None:
        """Sets for how long its rows are plain. Only for a sample that has sampled a token since it was admitted."""
        max_len, block_end = self.max_len, (self.num_indexed + 1) * block_size
        self.plain_end = self.provided + 1 if self.provided < max_len else max_len
        if self.tells_plain and not self.wants_prompt_logprobs:
            self.plain_known = block_end if block_end < max_len else max_len - 1

    def account(self) -> None:
        """Tells the ledger of the rows that were plain since the last time."""
        ledger, num_plain = self.request.ledger, len(self.tokens) - self.accounted
        ledger.chunks += num_plain
        ledger.computed_tokens += num_plain
        ledger.sampled_tokens += num_plain
        self.accounted += num_plain

    def describe_prompt(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes the logprobs of prompt positions from `start` on (1 is the first that has one). A prompt computed
        again after a preemption says again what is known, which is then passed over."""
        known = len(self.prompt_logprobs)
        if self.wants_prompt_logprobs and start - 1 <= known:
            self.prompt_logprobs += logprobs[known - (start - 1) :]

    def forget_progress(self) -> None:
        """Back to nothing computed: what preemption and a lost worker have in common. Known tokens stay."""
        self.incarnation += 1
        self.slot = -1
        self.tables = []
        self.provided = 0
        self.num_indexed = 0
        self.planned = 0
        self.computed = 0
        self.plain_end = 0
        self.plain_known = 0


def make_samples(request: Request) -> Iterable[Sample]:
    """The samples of a request, each with its own copy of the prompt's tokens."""
    submission = request.submission
    for index in range(submission.n):
        tokens = array("I", submission.token_ids)
        yield Sample(
            request=request,
            index=index,
            name=(request.key, index),
            tokens=tokens,
            prompt_len=len(tokens),
            max_len=request.max_len,
            stop_token_ids=submission.stopping.stop_token_ids,
            exact=submission.deterministic,
            wants_prompt_logprobs=index == 0 and submission.want.prompt_logprobs >= 0,
            tells_plain=submission.want.logprobs < 0 and submission.structured is None,
            known=len(tokens),
            accounted=len(tokens),
        )
