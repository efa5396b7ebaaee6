"""What a link has yet to write: submits in order, aborts merged."""

import asyncio
from collections.abc import Iterator

from services.router.fleet.frames import pack_frames, submit_parts
from services.router.fleet.values import Submission
from shared.outcome import AbortCause, refuse
from shared.rpc.sluice.v1 import scheduling_pb2 as pb

MAX_OUTBOX_BYTES = 64 * 2**20
"""Beyond this a submit is refused: the scheduler does not read."""
EVERY_SAMPLE = -1


class Outbox:
    """Bounded: submits by bytes (full: the request is refused), aborts by the live requests they end."""

    def __init__(self) -> None:
        self._submits: dict[int, list[pb.Submit]] = {}
        self._aborts: dict[tuple[int, int], AbortCause] = {}
        self._bytes = 0
        self._filled = asyncio.Event()

    def submit(self, key: int, submission: Submission) -> None:
        """Raises RefusedError when too much waits to be written."""
        if self._bytes > MAX_OUTBOX_BYTES:
            raise refuse("queue_full", "the scheduler is not taking requests fast enough", retry_after_ms=1_000)
        self._submits[key] = submit_parts(key, submission)
        self._bytes += 4 * len(submission.token_ids)
        self._filled.set()

    def abort(self, key: int, index: int, cause: AbortCause) -> bool:
        """False when the request had not been written yet: then it never will be, and nobody needs to be told."""
        if key in self._submits and index == EVERY_SAMPLE:
            self._bytes -= sum(len(part.token_ids) for part in self._submits.pop(key))
            return False
        if (key, EVERY_SAMPLE) not in self._aborts:
            self._aborts.setdefault((key, index), cause)
            self._filled.set()
        return True

    async def wait(self) -> None:
        """Until there is something to take."""
        await self._filled.wait()

    def take(self) -> Iterator[pb.RouterFrame]:
        """Everything that waits, packed; the outbox is empty afterwards."""
        submits = [part for parts in self._submits.values() for part in parts]
        aborts, self._aborts = self._aborts, {}
        self._submits = {}
        self._bytes = 0
        self._filled.clear()
        return pack_frames(submits, aborts)
