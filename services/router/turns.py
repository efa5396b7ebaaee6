"""A thread whose work is taken in turns by those who ask for it, so that one with much of it holds up nobody long."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FairThread:
    """One job at a time; of the askers that wait the next one's oldest job. Owned by the event loop."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By asker, the one whose turn is next first."""
        self._busy = False

    async def run(self, asker: str, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the job returns or raises. Cancelled while it waits, the job is not begun."""
        if self._busy:
            await self._turn(asker)
        self._busy = True
        loop = asyncio.get_running_loop()
        running = self._thread.submit(job, *args, **kwargs)
        running.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._begin_next))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, asker: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(asker, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was this one's turn already
                self._begin_next()
            raise

    def _begin_next(self) -> None:
        self._busy = False
        while self._waiting and not self._busy:
            asker = next(iter(self._waiting))
            turns = self._waiting.pop(asker)
            turn = turns.popleft()
            if turns:
                self._waiting[asker] = turns  # behind the others
            if not turn.done():
                turn.set_result(None)
                self._busy = True
