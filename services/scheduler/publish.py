"""Frames to routers: one per step and link, merged while a router does not read, bounded."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

from services.scheduler.core.events import Event, PlainTokens
from services.scheduler.core.worker_group import GroupLoad
from services.scheduler.wire import PLAIN_TOKEN, Frame, FrameMessage, SchedulerState
from shared.clock import NS_PER_MS, NS_PER_S, NowNs

MAX_UNSENT_EVENTS = 200_000
"""A link with more is closed: its router is gone in all but name."""
BEAT_NS = 800 * NS_PER_MS
"""A link that was told nothing for so long gets an empty frame at the next look, so that a router hears something every
second: a scheduler whose loop hangs keeps its connection alive, but not this."""
LOAD_INTERVAL_NS = 20 * NS_PER_MS


@dataclass(slots=True, eq=False)
class RouterLink:
    """One router's stream: what is not sent yet, in one frame that grows until the writer takes it."""

    number: int
    router: str
    frame: Frame = field(default_factory=Frame)
    num_unsent: int = 0
    taken_ns: int = 0
    """When the writer last took a frame, or was first given something to take."""
    closed: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        self._ready.set()

    def close(self) -> None:
        self.closed = True
        self._ready.set()

    async def frames(self, now_ns: NowNs) -> AsyncIterator[FrameMessage]:
        """Frames as they come, until the link is closed."""
        while not self.closed:
            await self._ready.wait()
            self._ready.clear()
            frame, self.frame, self.num_unsent = self.frame, Frame(), 0
            self.taken_ns = now_ns()
            for message in frame.messages():
                yield message


class Publisher:
    """Owns the router links. Never awaits one."""

    def __init__(self, now_ns: NowNs, stall_timeout_ns: int) -> None:
        self._now_ns = now_ns
        self._stall_timeout_ns = stall_timeout_ns
        self._links: dict[int, RouterLink] = {}
        self._next_link = 1
        self._warm: Counter[bytes] = Counter()
        self._loads_sent: list[GroupLoad] = []
        self._loads_read_ns = 0
        self._loads_timer: asyncio.TimerHandle | None = None
        self.state: Callable[[], SchedulerState] = SchedulerState
        self.loads: Callable[[], list[GroupLoad]] = list
        self.request_turn: Callable[[], None] = lambda: None
        """Asks the loop to plan and to publish, though nothing happened."""

    @property
    def links(self) -> list[RouterLink]:
        return list(self._links.values())

    def open(self, router: str) -> RouterLink:
        """A new link; its first frame tells the state, the loads and every warm block."""
        link = RouterLink(self._next_link, router)
        self._next_link += 1
        self._links[link.number] = link
        link.frame.tell_state(self.state())
        link.frame.tell_loads(self.loads())
        link.frame.tell_blocks(set(self._warm), set())
        link.notify()
        return link

    def close(self, link: RouterLink) -> None:
        self._links.pop(link.number, None)
        link.close()

    def publish(self, events: Iterable[Event]) -> None:
        """Adds events to the frames of their links; events of a closed link are dropped. Loads go along, unless
        they did just before; then they go along with a later step, or alone where there is none for a while."""
        for event in events:
            if isinstance(event, PlainTokens):
                self._publish_plain(event)
                continue
            link = self._links.get(event.key[0])  # type: ignore[index]
            if link is not None:
                link.frame.tell_event(event)
                self._note(link, 1)
        self._publish_loads()

    def _publish_plain(self, event: PlainTokens) -> None:
        packed: dict[int, list[bytes]] = {number: [] for number in self._links}
        tells = {number: tokens.append for number, tokens in packed.items()}
        pack, names = PLAIN_TOKEN.pack, cast(list[tuple[tuple[int, int], int]], event.names)
        for ((number, key), index), token_id in zip(names, event.token_ids, strict=True):
            tell = tells.get(number)
            if tell is not None:
                tell(pack(key, index, token_id))
        for number, tokens in packed.items():
            if tokens:
                self._links[number].frame.plain += tokens
                self._note(self._links[number], len(tokens))

    def _note(self, link: RouterLink, num_events: int) -> None:
        """The link's frame has so many more."""
        if link.num_unsent == 0:
            link.taken_ns = self._now_ns()  # it had nothing to take until now
        link.num_unsent += num_events
        link.notify()

    def publish_state(self) -> None:
        """To every router: the scheduler's state changed."""
        for link in self._links.values():
            link.frame.tell_state(self.state())
            link.notify()

    def publish_blocks(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Blocks that came and went in one group: routers hear of the first copy and of the last."""
        came = {block for block in stored if self._count(block, 1) == 1}
        gone = {block for block in removed if self._count(block, -1) == 0}
        came, gone = {block for block in came if self._warm[block]}, {block for block in gone if not self._warm[block]}
        if not came and not gone:
            return
        for link in self._links.values():
            link.frame.tell_blocks(came, gone)

    def beat(self) -> None:
        """An empty frame on links that were told nothing for a while. Called a few times a second."""
        oldest = self._now_ns() - BEAT_NS
        for link in self._links.values():
            if link.taken_ns < oldest:
                link.notify()

    def stalled(self) -> list[RouterLink]:
        """Links whose writer took nothing for too long, or that hold too much."""
        oldest = self._now_ns() - self._stall_timeout_ns
        return [
            link
            for link in self._links.values()
            if link.num_unsent > MAX_UNSENT_EVENTS or (link.num_unsent and link.taken_ns < oldest)
        ]

    def _count(self, block: bytes, change: int) -> int:
        count = self._warm[block] + change
        if count > 0:
            self._warm[block] = count
        else:
            self._warm.pop(block, None)
        return count

    def _publish_loads(self) -> None:
        """Only here, behind a plan: in between, a request that has just come would seem to wait."""
        now_ns = self._now_ns()
        if not self._links:
            return
        if now_ns < self._loads_read_ns + LOAD_INTERVAL_NS:
            if self._loads_timer is None:
                self._loads_timer = asyncio.get_running_loop().call_later(LOAD_INTERVAL_NS / NS_PER_S, self._ask_turn)
            return
        if self._loads_timer is not None:
            self._loads_timer.cancel()
            self._loads_timer = None
        self._loads_read_ns = now_ns
        current = self.loads()
        if current == self._loads_sent:
            return
        self._loads_sent = current
        for link in self._links.values():
            link.frame.tell_loads(current)
            link.notify()

    def _ask_turn(self) -> None:
        self._loads_timer = None
        self.request_turn()
