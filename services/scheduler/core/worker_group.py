"""One worker group as the core sees it: a pool of blocks, a set of slots, who runs, who waits, what is in flight.

A worker group is a place where samples run; a cache group (`groups.py`) is a set of its model's layers.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from services.scheduler.core.blocks import BlockPool
from services.scheduler.core.grammars import Grammars
from services.scheduler.core.groups import BlockTable, CacheGroup, match_prefix
from services.scheduler.core.phases import WaitClock, WaitReason
from services.scheduler.core.plan import StepPlan
from services.scheduler.core.queue import OrderedSamples
from services.scheduler.core.request import Sample
from shared.cache_groups import UNBOUNDED, Window, held_blocks, longest_context
from shared.prefix import next_hash

DRIFT = 0.001
"""How fast a best figure is forgotten: by half in 700 steps."""


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker group brings. `windows` has one entry per cache group, None for one that sees all positions."""

    id: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int = 2**31 - 1
    windows: tuple[Window, ...] = (None,)


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one group; free + cached + referenced = total."""

    group: str
    requests_running: int
    requests_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_referenced: int
    waiting_by_reason: dict[str, int] = {}


@dataclass(slots=True)
class InFlight:
    """A plan that was sent: its samples by row, and the blocks it made pending. `left` are samples that gave up their
    slots meanwhile: what the plan computes for them is lost. `aborted_ns` says when samples were aborted that no later
    plan computes for."""

    plan: StepPlan
    rows: list[Sample]
    pending: list[int]
    left: set[Sample] = field(default_factory=set)
    aborted_ns: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Pace:
    """What this group was seen to do; 0 while unknown. Both figures are the best of late, so that an estimate never
    refuses what could have been done; both drift towards the worse, step by step of their own kind."""

    prefill_tokens_per_ns: float = 0.0
    decode_step_ns: float = 0.0

    def learn(self, num_tokens: int, num_rows: int, run_ns: int) -> None:
        """Steps that cut a prompt tell of prefill, the others of decoding."""
        if run_ns <= 0:
            return
        if num_tokens > num_rows:
            self.prefill_tokens_per_ns = max(self.prefill_tokens_per_ns * (1 - DRIFT), num_tokens / run_ns)
        else:
            drifted = self.decode_step_ns * (1 + DRIFT)
            self.decode_step_ns = min(drifted, run_ns) if drifted else run_ns

    def estimate_ns(self, prompt_tokens: int, decode_steps: int) -> float:
        """The least time for so much work; 0 while nothing was measured."""
        prefill = prompt_tokens / self.prefill_tokens_per_ns if self.prefill_tokens_per_ns else 0.0
        return prefill + decode_steps * self.decode_step_ns


@dataclass(slots=True, eq=False)
class WorkerGroup:
    """Owns its pool, slots and queues. Holds no policy: the scheduler decides. A step takes at most `chunk` tokens of a
    sample."""

    spec: GroupSpec
    chunk: int
    pool: BlockPool = field(init=False)
    cache: tuple[CacheGroup, ...] = field(init=False)
    has_windows: bool = field(init=False)
    longest: int = field(init=False)
    """The most tokens of one sample that the pool can cache."""
    running: OrderedSamples = field(default_factory=OrderedSamples)
    waiting: OrderedSamples = field(default_factory=OrderedSamples)
    preparing: OrderedSamples = field(default_factory=OrderedSamples)
    """Those that wait for their grammar: no plan may hold them, and they hold up nobody."""
    grammars: Grammars = field(default_factory=Grammars)
    clock: WaitClock = field(default_factory=WaitClock)
    pace: Pace = field(default_factory=Pace)
    in_flight: deque[InFlight] = field(default_factory=deque)
    free_slots: list[int] = field(init=False)
    next_step: int = 1

    def __post_init__(self) -> None:
        spec, windows = self.spec, self.spec.windows
        self.pool = BlockPool(spec.num_blocks, spec.block_size, len(windows))
        self.cache = tuple(CacheGroup.of(window, spec.block_size, self.chunk) for window in windows)
        self.has_windows = any(window is not None for window in windows)
        self.longest = longest_context(spec.num_blocks, windows, spec.block_size, self.chunk)
        self.free_slots = list(range(self.spec.max_num_seqs - 1, -1, -1))

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def headroom_blocks(self) -> int:
        """Blocks left alone when a sample joins others, so that their next tokens do not preempt it at once."""
        return max(1, self.spec.num_blocks // 100) if len(self.running) else 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.preparing)

    def queue_of(self, sample: Sample) -> OrderedSamples:
        """Where a waiting sample of this group stands."""
        return self.waiting if self.grammars.is_ready(sample.structured) else self.preparing

    @property
    def has_work(self) -> bool:
        """Whether its device has something to do, or soon will."""
        return bool(self.running.samples or self.waiting.samples or self.in_flight)

    def fits(self, max_len: int) -> bool:
        """Whether a sample of so many known tokens can ever run here alone. Its last token is never cached."""
        return max_len - 1 <= self.longest

    def most_held(self, num_tokens: int) -> int:
        """The most blocks that a sample of so many tokens, none of them warm, holds at once."""
        return held_blocks(num_tokens, self.spec.windows, self.spec.block_size, self.chunk)

    def missing(self, tables: list[BlockTable], num_tokens: int) -> list[int]:
        """By cache group: blocks to take before the tables hold those of `num_tokens` tokens, or as many of them as are
        held at once. All that are known are taken ahead, so that a prompt that was begun does not run out of blocks."""
        needed, missing = -(-num_tokens // self.spec.block_size), []
        for group, table in zip(self.cache, tables, strict=True):
            end = table.first + group.most
            missing.append((needed if needed < end else end) - table.first - len(table.blocks))
        return missing

    def provide(self, sample: Sample, missing: list[int]) -> list[list[int]]:
        """Takes as many blocks for each cache group, which must be there, and returns them."""
        block_size, new_blocks, provided = self.spec.block_size, [], UNBOUNDED
        for group, table, count in zip(self.cache, sample.tables, missing, strict=True):
            blocks = self.pool.take_many(count)
            table.blocks += blocks
            new_blocks.append(blocks)
            end = (table.first + len(table.blocks)) * block_size
            if group.window is not None:  # up to where its first block is seen
                end = min(end, (table.first + 1) * block_size + group.window - 1)
            if end < provided:
                provided = end
        sample.provided = provided
        return new_blocks

    def drop_stale(self, sample: Sample) -> None:
        """Lets go of blocks that no step from the sample's next one on reads."""
        if not self.has_windows:
            return
        for group, table in zip(self.cache, sample.tables, strict=True):
            num_stale = group.first(sample.planned) - table.first
            if num_stale > 0:
                self.pool.release(table.blocks[:num_stale])
                del table.blocks[:num_stale]
                table.first += num_stale

    def load(self) -> GroupLoad:
        pool = self.pool
        return GroupLoad(
            group=self.id,
            requests_running=len(self.running),
            requests_waiting=self.num_waiting,
            kv_blocks_total=pool.num_blocks,
            kv_blocks_free=len(pool.free),
            kv_blocks_cached=len(pool.cached),
            kv_blocks_referenced=pool.num_referenced,
            waiting_by_reason={reason.value: count for reason, count in self.waiting_by_reason().items()},
        )

    def waiting_by_reason(self) -> Counter[WaitReason]:
        """How many samples wait for what: the queue's reason, or their request's own."""
        counts = Counter(sample.request.ledger.own_reason or self.clock.reason for sample in list(self.waiting.samples))
        if len(self.preparing):
            counts[WaitReason.GRAMMAR] = len(self.preparing)
        return counts

    def match(self, sample: Sample) -> list[BlockTable]:
        """Tables with blocks that hold a prefix of the sample's tokens. The last token is left to compute, since its
        logits are wanted; a sample whose prompt logprobs are wanted computes everything."""
        if sample.wants_prompt_logprobs:
            return [BlockTable() for _ in self.cache]
        self.extend_hashes(sample)
        usable = (len(sample.tokens) - 1) // self.spec.block_size
        return match_prefix(self.pool.index, self.cache, sample.hashes[:usable], sample.tokens, sample.request.root)

    def num_warm(self, sample: Sample) -> int:
        """How many of the sample's tokens stand in blocks already."""
        return self.match(sample)[0].end * self.spec.block_size

    def extend_hashes(self, sample: Sample) -> None:
        """Hashes the full blocks of known tokens that have no hash yet."""
        block_size = self.spec.block_size
        hashes = sample.hashes
        for i in range(len(hashes), len(sample.tokens) // block_size):
            parent = hashes[-1] if hashes else sample.request.root
            hashes.append(next_hash(parent, sample.tokens[i * block_size : (i + 1) * block_size]))

    def index_full_blocks(self, sample: Sample, upto: int) -> list[int]:
        """Offers the sample's blocks below token `upto` (all known) to the index, but for those that it let go of;
        returns those that the index took."""
        full = upto // self.spec.block_size
        if full <= sample.num_indexed:
            return []
        block_size, index, hashes, taken = self.spec.block_size, self.pool.index, sample.hashes, []
        for i in range(sample.num_indexed, full):
            parent = hashes[i - 1] if i else sample.request.root
            tokens = sample.tokens[i * block_size : (i + 1) * block_size]
            if i == len(hashes):
                hashes.append(next_hash(parent, tokens))
            for number, table in enumerate(sample.tables):
                if i < table.first:
                    continue
                block = table.blocks[i - table.first]
                if block not in index.by_block and index.add(block, number, hashes[i], parent, tokens):
                    taken.append(block)
        sample.num_indexed = full
        return taken
