"""Every scheduler behind this router."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from services.router.fleet.addresses import check_addresses, resolve
from services.router.fleet.link import Link
from services.router.fleet.values import Expected, Load, Placed, Sink, Submission, Ticket
from services.router.limits import too_long
from services.router.placement import Candidate, choose
from shared.outcome import refuse
from shared.prefix import BlockHash

log = structlog.get_logger("fleet")

RESOLVE_EVERY_S = 5.0
NO_SCHEDULER_RETRY_MS = 1_000

Chains = dict[int, list[BlockHash]]
"""A prompt's block hashes by block size."""


class Fleet:
    """Owns the links and their tasks, for as long as `run` runs. Raises ConfigError for an impossible address."""

    def __init__(self, addresses: Sequence[str], *, router: str, token: str, expected: Expected) -> None:
        check_addresses(addresses)
        self._addresses = tuple(addresses)
        self._make = lambda target: Link(target, router=router, token=token, expected=expected)
        self._links: dict[str, Link] = {}
        self._retired: dict[str, Link] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._on_change: Callable[[], None] = lambda: None

    def on_change(self, callback: Callable[[], None]) -> None:
        """`callback` is called whenever a scheduler comes, goes or changes its state."""
        self._on_change = callback

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(self._links.values())

    @property
    def num_usable(self) -> int:
        return sum(link.usable for link in self._links.values())

    @property
    def block_sizes(self) -> frozenset[int]:
        return frozenset(link.state.block_size for link in self._usable() if link.state)

    @property
    def max_model_len(self) -> int:
        """The longest sequence that any usable scheduler takes; 0 without one."""
        return max((link.state.max_model_len for link in self._usable() if link.state), default=0)

    @property
    def dtype(self) -> str:
        return next((link.state.dtype for link in self._usable() if link.state), "")

    def loads(self) -> list[tuple[str, Load]]:
        """(scheduler's address, load) of every worker group."""
        return [(link.target, load) for link in self._links.values() for load in link.loads]

    def require_usable(self) -> None:
        """Raises RefusedError no_scheduler while nobody could answer."""
        if not self._usable():
            message = "no scheduler is ready; the cluster is starting or has lost its workers"
            raise refuse("no_scheduler", message, retry_after_ms=NO_SCHEDULER_RETRY_MS)

    def place(self, num_tokens: int, chains: Chains) -> tuple[Link, Placed]:
        """The scheduler for a prompt, and why that one. Raises RefusedError: no_scheduler, or prompt_too_long for all
        of them."""
        self.require_usable()
        fitting = [link for link in self._usable() if link.state and num_tokens < link.state.max_model_len]
        candidates = [_candidate(link, chains) for link in fitting]
        choice = choose(candidates, num_tokens)
        if choice is None:
            raise too_long("prompt", f"{num_tokens} tokens", self.max_model_len)
        link = fitting[choice.index]
        placed = Placed(
            target=link.target,
            scheduler=link.state.scheduler if link.state else "",
            overlap_tokens=candidates[choice.index].overlap_tokens,
            candidates=tuple(candidate.name for candidate in candidates),
            costs=choice.costs,
        )
        return link, placed

    def submit(self, link: Link, submission: Submission, sink: Sink) -> Ticket:
        """Hands a request to the scheduler that `place` chose."""
        return link.submit(submission, sink)

    def _usable(self) -> list[Link]:
        return [link for link in self._links.values() if link.usable]

    # The links' lives.

    async def run(self) -> None:
        """Keeps one link per scheduler, following DNS, until cancelled."""
        try:
            while True:
                await self._refresh()
                await asyncio.sleep(RESOLVE_EVERY_S)
        finally:
            tasks = [task for pair in self._tasks.values() for task in pair]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh(self) -> None:
        targets: dict[str, None] = {}
        for address in self._addresses:
            try:
                targets.update(dict.fromkeys(await resolve(address)))
            except (OSError, TimeoutError, ValueError) as error:
                log.warning("scheduler_unresolved", scheduler=address, reason=str(error))
                targets.update(dict.fromkeys(self._links))  # a name server's failure removes nobody
        for target in targets:
            if target not in self._links:
                self._add(target)
        for target in [target for target in self._links if target not in targets]:
            self._retired[target] = self._links.pop(target)
            self._on_change()
        await self._close_retired()

    def _add(self, target: str) -> None:
        link = self._retired.pop(target, None)
        if link is None:
            link = self._make(target)
            runner = asyncio.create_task(link.run(), name=f"link {target}")
            watcher = asyncio.create_task(self._watch(link), name=f"link-watch {target}")
            self._tasks[target] = [runner, watcher]
        self._links[target] = link

    async def _watch(self, link: Link) -> None:
        while True:
            await link.wait_changed()
            self._on_change()

    async def _close_retired(self) -> None:
        """A scheduler that left DNS is let go when its requests have ended."""
        for target in [target for target, link in self._retired.items() if link.num_entries == 0]:
            del self._retired[target]
            tasks = self._tasks.pop(target)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _candidate(link: Link, chains: Chains) -> Candidate:
    block_size = link.state.block_size if link.state else 1
    loads = link.loads
    free_blocks = max((load.kv_blocks_free + load.kv_blocks_cached for load in loads), default=2**40)
    return Candidate(
        name=link.target,
        overlap_tokens=link.warm_tokens(chains.get(block_size, [])),
        requests_running=sum(load.requests_running for load in loads),
        requests_waiting=sum(load.requests_waiting for load in loads),
        unseen=link.unseen,
        free_tokens=free_blocks * block_size,
    )
