"""What must hold after every step. In tests a violation fails; in production it is counted and
the workers start afresh."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from services.scheduler.core.request import Sample, Status
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.worker_group import WorkerGroup


def violations(scheduler: Scheduler) -> list[str]:
    """Every broken invariant, as a sentence; empty when all hold. Takes time proportional to blocks and requests."""
    found = [text for group in scheduler.groups.values() for text in _group_violations(group)]
    live = [s for r in scheduler.requests.values() for s in r.samples if s.status is not Status.ENDED]
    placed = Counter(id(s) for g in scheduler.groups.values() for s in [*g.running, *g.waiting, *g.preparing])
    found += [f"{_name(s)} stands in {placed[id(s)]} queues" for s in live if placed[id(s)] != 1]
    if len(placed) != len(live):
        found.append(f"{len(placed)} samples are queued, {len(live)} are live")
    found += [f"request {r.key} has no live sample" for r in scheduler.requests.values() if not r.num_live]
    return found


def _group_violations(group: WorkerGroup) -> Iterator[str]:
    yield from _pool_violations(group)
    yield from _slot_violations(group)
    yield from _index_violations(group)
    in_flight: Counter[int] = Counter()
    for flight in group.in_flight:
        for row, sample in enumerate(flight.rows):
            in_flight[id(sample)] += flight.plan.samples[row]
    for sample in group.running:
        yield from _running_violations(group, sample, in_flight[id(sample)])
    yield from _grammar_violations(group)
    for sample in [*group.waiting, *group.preparing]:
        if sample.status is not Status.WAITING or sample.tables or sample.slot != -1 or sample.planned:
            yield f"{_name(sample)} waits but holds a slot, blocks or progress"
        if sample.unknown != in_flight[id(sample)]:
            yield f"{_name(sample)} waits for {sample.unknown} tokens, {in_flight[id(sample)]} are in flight"


def _pool_violations(group: WorkerGroup) -> Iterator[str]:
    pool = group.pool
    free, cached = set(pool.free), set(pool.cached)
    referenced = {block for block, count in enumerate(pool.references) if count}
    if len(free) != len(pool.free):
        yield f"{group.id}: a block is free twice"
    if len(free) + len(cached) + len(referenced) != pool.num_blocks or free & cached or (free | cached) & referenced:
        yield f"{group.id}: {len(free)} free + {len(cached)} cached + {len(referenced)} referenced ≠ {pool.num_blocks}"
    held = Counter(block for sample in group.running for table in sample.tables for block in table.blocks)
    for block in referenced | set(held):
        if held[block] != pool.references[block]:
            yield f"{group.id}: block {block} has {pool.references[block]} references, {held[block]} tables hold it"


def _slot_violations(group: WorkerGroup) -> Iterator[str]:
    slots = sorted([*group.free_slots, *(sample.slot for sample in group.running)])
    if slots != list(range(group.spec.max_num_seqs)):
        yield f"{group.id}: free and taken slots are {slots}"
    queues = ((group.running, "running"), (group.waiting, "waiting"), (group.preparing, "preparing"))
    for queue, name in queues:
        if queue.tokens != sum(sample.backlog for sample in queue):
            yield f"{group.id}: the {name} queue counts {queue.tokens} tokens"
        if any(a.order >= b.order for a, b in pairwise(queue.samples)):
            yield f"{group.id}: the {name} queue is out of order"


def _grammar_violations(group: WorkerGroup) -> Iterator[str]:
    grammars = group.grammars
    needed = Counter(s.structured for s in [*group.running, *group.waiting, *group.preparing] if s.structured)
    if len(grammars) != len(needed):
        yield f"{group.id}: {len(grammars)} grammars are held, {len(needed)} needed"
    for structured, count in needed.items():
        if grammars.num_samples(structured) != count:
            yield f"{group.id}: {count} samples need a grammar that counts {grammars.num_samples(structured)}"
    for sample in [*group.running, *group.waiting]:
        if not grammars.is_ready(sample.structured):
            yield f"{_name(sample)} may run, and its grammar is not ready"
    for sample in group.preparing:
        if grammars.is_ready(sample.structured):
            yield f"{_name(sample)} waits for a grammar that is ready"


def _index_violations(group: WorkerGroup) -> Iterator[str]:
    index, pool = group.pool.index, group.pool
    num_hashes = sum(map(len, index.by_hash))
    if num_hashes != len(index.by_block):
        yield f"{group.id}: the index maps {num_hashes} hashes to {len(index.by_block)} blocks"
    for block, entry in index.by_block.items():
        if index.by_hash[entry.group].get(entry.hash) is not entry or entry.block != block:
            yield f"{group.id}: block {block} is indexed inconsistently"
        if len(entry.token_ids) != pool.block_size:
            yield f"{group.id}: block {block} is indexed with {len(entry.token_ids)} tokens"
    for block in pool.cached:
        if block not in index.by_block:
            yield f"{group.id}: block {block} is cached but not indexed"
    for block in pool.free:
        if block in index.by_block:
            yield f"{group.id}: block {block} is free but indexed"


def _table_violations(group: WorkerGroup, sample: Sample) -> Iterator[str]:
    if len(sample.tables) != len(group.cache):
        yield f"{_name(sample)} has {len(sample.tables)} tables for {len(group.cache)} cache groups"
    for number, (cache, table) in enumerate(zip(group.cache, sample.tables, strict=False)):
        name = f"{_name(sample)}, cache group {number}"
        if table.end * group.spec.block_size < sample.planned:
            yield f"{name}: planned {sample.planned} tokens into blocks {table.first} to {table.end}"
        if table.first > cache.first(sample.planned):
            yield f"{name}: let go of block {table.first - 1}, which it still reads"
        if len(table.blocks) > cache.most:
            yield f"{name}: holds {len(table.blocks)} blocks, at most {cache.most}"
        for block in table.blocks:
            entry = group.pool.index.by_block.get(block)
            if entry and entry.group != number:
                yield f"{name}: block {block} is indexed for cache group {entry.group}"


def _running_violations(group: WorkerGroup, sample: Sample, in_flight: int) -> Iterator[str]:
    if sample.status is not Status.RUNNING:
        yield f"{_name(sample)} runs but is {sample.status.value}"
    if not 0 <= sample.computed <= sample.planned <= sample.known:
        yield f"{_name(sample)}: computed {sample.computed}, planned {sample.planned}, known {sample.known}"
    if sample.unknown != in_flight:
        yield f"{_name(sample)} awaits {sample.unknown} tokens, {in_flight} are in flight"
    yield from _table_violations(group, sample)
    if len(sample.tokens) >= sample.max_len:
        yield f"{_name(sample)} runs beyond its length of {sample.max_len}"
    block_end = (sample.num_indexed + 1) * group.spec.block_size
    if sample.plain_end > min(sample.provided + 1, sample.max_len):
        yield f"{_name(sample)} is planned without a look up to {sample.plain_end}"
    if sample.plain_known > min(block_end, sample.max_len - 1):
        yield f"{_name(sample)} is applied without a look up to {sample.plain_known}"
    if sample.plain_known and sample.computed != len(sample.tokens) - 1:
        yield f"{_name(sample)} is applied without a look while {sample.computed} of {len(sample.tokens)} are computed"


def _name(sample: Sample) -> str:
    return f"sample {sample.request.key}/{sample.index}"
