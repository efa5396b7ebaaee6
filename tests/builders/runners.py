"""Runners on real decoders, and a careless little scheduler that plans their steps at random."""

import random
from collections import deque
from dataclasses import dataclass, field

from services.worker.execute.runner import Runner
from services.worker.execute.slots import Slots
from services.worker.memory.copies import Arrival
from services.worker.memory.layout import layout_of
from services.worker.memory.pool import allocate_pool
from services.worker.models.decoder import Decoder
from services.worker.plan import RowLogprobs, RowPromptLogprobs, StepRunner
from services.worker.sampling.guide import Masks
from services.worker.sampling.sampler import Sampler
from shared.cache_groups import first_block
from tests.builders.plans import GREEDY, make_admit, make_plan

POISON = 1e4


def make_runner(
    decoder: Decoder,
    *,
    num_blocks: int = 64,
    block_size: int = 8,
    max_num_seqs: int = 16,
    max_model_len: int = 256,
    poison: bool = True,
    device: str = "cpu",
    **fields,
) -> Runner:
    """A runner with its own pool, whose pages begin absurdly large, so that reading what was never written shows; but
    finite, as kernels.ops.attention asks of every slot."""
    layout = layout_of(decoder.spec, decoder.dtype, block_size)
    pool = allocate_pool(layout, num_blocks, device)
    if poison:
        pool.pages.fill_(POISON)
    vocab_size = decoder.spec.vocab_size
    slots = Slots(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        num_pool_blocks=num_blocks,
        vocab_size=vocab_size,
        windows=layout.windows,
    )
    sampler = Sampler(max_num_seqs=max_num_seqs, vocab_size=vocab_size, masks=Masks(vocab_size))
    return Runner(decoder, pool.pages, slots, sampler, **fields)


@dataclass(slots=True)
class Asked:
    """One request and what came of it. `sampling` and further fields are those of an Admit."""

    prompt: list[int]
    max_tokens: int
    fields: dict = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[RowLogprobs] = field(default_factory=list)
    prompt_logprobs: list[RowPromptLogprobs] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    tables: list[list[int]] = field(default_factory=list)
    """Blocks by cache group; the first `gone` of them are others' by now."""
    gone: list[int] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.max_tokens


def answer_alone(runner: StepRunner, asked: Asked) -> Asked:
    """The whole prompt in one step, then token by token."""
    return answer_all(runner, [asked], random.Random(0), chunk=10**6, preempt=0.0)[0]


def answer_all(
    runner: StepRunner,
    requests: list[Asked],
    rng: random.Random,
    *,
    chunk: int = 9,
    preempt: float = 0.1,
    block_size: int = 8,
    num_blocks: int = 64,
    max_num_seqs: int = 16,
    ahead: int = 0,
    windows: tuple[int | None, ...] = (None,),
) -> list[Asked]:
    """Runs all requests to their ends in random batches and chunks of at most `chunk` tokens, taking some out of their
    slots on the way; their blocks then go to others, as do those that no window sees any more. Up to `ahead` steps are
    begun before the oldest is finished, and go on from tokens that are not known yet (None)."""
    free_blocks, free_slots = list(range(num_blocks)), list(range(max_num_seqs))
    rng.shuffle(free_blocks)
    rng.shuffle(free_slots)
    runner.reset()
    step, begun = 0, deque()
    while begun or any(not each.done for each in requests):
        open_requests = [each for each in requests if not each.done]
        for each in requests:
            if each.slot >= 0 and (each.done or rng.random() < preempt):
                free_slots.append(each.slot)
                for gone, table in zip(each.gone, each.tables, strict=True):
                    free_blocks += table[gone:]
                each.slot, each.computed = -1, 0
        rows, admits, planned = [], [], []
        for each in rng.sample(open_requests, rng.randint(1, len(open_requests))) if open_requests else ():
            room = len(free_blocks) // len(windows) * block_size
            left = len(each.known) - each.computed
            count = min(left, rng.randint(1, chunk) if chunk < left else left)
            if room < count or (each.slot < 0 and (not free_slots or None in each.tokens)):
                continue
            if each.slot < 0:
                each.slot = free_slots.pop(0)
                each.tables, each.gone = [[] for _ in windows], [0] * len(windows)
                admits.append(make_admit(each.slot, each.known, prompt_len=len(each.prompt), **each.fields))
            for group, window in enumerate(windows):
                end = first_block(window, each.computed, block_size)
                free_blocks += each.tables[group][each.gone[group] : end]
                each.gone[group] = max(end, each.gone[group])
            needed = -(-(each.computed + count) // block_size) - len(each.tables[0])
            further = [[free_blocks.pop(0) for _ in range(needed)] for _ in windows]
            for table, blocks in zip(each.tables, further, strict=True):
                table += blocks
            each.computed += count
            rows.append((each.slot, count, each.computed == len(each.known), further))
            planned.append(each)
        if rows:
            step += 1
            begun.append((runner.begin(make_plan(step, rows, admits)), rows, _placed(rows, planned)))
        while begun and (len(begun) > ahead or not rows):
            pending, old_rows, places = begun.popleft()
            _absorb(runner.finish(pending), old_rows, places)
    return requests


def _placed(rows, planned) -> list[tuple[Asked, int]]:
    """Which request each row is of, and where among its tokens the sampled one goes."""
    places = []
    for each, (_, _, samples, _) in zip(planned, rows, strict=True):
        places.append((each, len(each.tokens)))
        if samples:
            each.tokens.append(None)
    return places


def _absorb(output, rows, places) -> None:
    tokens = iter(output.tokens.tolist())
    for (each, at), (_, _, samples, _) in zip(places, rows, strict=True):
        if samples:
            each.tokens[at] = next(tokens)
    for entry in output.logprobs:
        places[entry.row][0].logprobs.append(entry)
    for entry in output.prompt_logprobs:
        places[entry.row][0].prompt_logprobs.append(entry)


class LateCopies:
    """A device that keeps its results to itself: until a step is read nothing that it sampled is on the host."""

    overlaps = True

    def fetch(self, tensors):
        return Arrival([tensor.clone().cpu() for tensor in tensors])


def make_asked(prompt: list[int], max_tokens: int, **fields) -> Asked:
    fields.setdefault("sampling", GREEDY)
    return Asked(prompt, max_tokens, fields)
