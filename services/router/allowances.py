"""What each API key has in use, and what is left of its tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.router.gate import Key
from shared.clock import NS_PER_S, NowNs
from shared.outcome import refuse

BUSY_RETRY_MS = 1_000
SECONDS = 60


@dataclass(slots=True)
class _Account:
    in_flight: int = 0
    tokens: float = 0.0
    """Left of those of a minute; below 0 where an answer took more than there were."""
    at_ns: int = 0


class Allowances:
    """Accounts by the key's name, begun when it is first used. Keys without limits have none.

    Each of `processes` routers on the same ports keeps accounts of its own, over its share of the limits.
    """

    def __init__(self, now: NowNs, processes: int = 1) -> None:
        self._now = now
        self._processes = processes
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: Key) -> None:
        """A request begins. Raises RefusedError quota_exceeded, which says when to try again."""
        account = self._account(key)
        if account is None:
            return
        most = self.max_requests(key)
        if most and account.in_flight >= most:
            message = f"{most} requests of this API key are in flight{self._of_whole(key.max_requests)}"
            raise refuse("quota_exceeded", message, retry_after_ms=BUSY_RETRY_MS)
        if key.tokens_per_minute and account.tokens <= 0:
            wait_ms = int((1 - account.tokens) * SECONDS * 1000 / self._tokens_per_minute(key)) + 1
            whole = self._of_whole(key.tokens_per_minute)
            message = f"this API key has used its {self._tokens_per_minute(key):g} tokens a minute{whole}"
            raise refuse("quota_exceeded", message, retry_after_ms=wait_ms)
        account.in_flight += 1

    def leave(self, key: Key) -> None:
        """It ended."""
        account = self._account(key)
        if account is not None:
            account.in_flight -= 1

    @contextmanager
    def entered(self, key: Key) -> Iterator[None]:
        """A request is in flight for the length of the block. Raises RefusedError as `enter` does."""
        self.enter(key)
        try:
            yield
        finally:
            self.leave(key)

    def spend(self, key: Key, tokens: int) -> None:
        """What it took, once that is known."""
        account = self._account(key)
        if account is not None:
            account.tokens -= tokens

    def max_requests(self, key: Key) -> int:
        """How many requests of the key's may be in flight here at once; 0 without a limit."""
        return -(-key.max_requests // self._processes)

    def _tokens_per_minute(self, key: Key) -> float:
        return key.tokens_per_minute / self._processes

    def _of_whole(self, limit: int) -> str:
        return f" in this of {self._processes} processes, which share {limit}" if self._processes > 1 else ""

    def _account(self, key: Key) -> _Account | None:
        """With the tokens that time has brought back."""
        if not key.max_requests and not key.tokens_per_minute:
            return None
        now_ns = self._now()
        per_minute = self._tokens_per_minute(key)
        account = self._accounts.setdefault(key.name, _Account(tokens=per_minute, at_ns=now_ns))
        grown = (now_ns - account.at_ns) / NS_PER_S * per_minute / SECONDS
        account.tokens, account.at_ns = min(per_minute, account.tokens + grown), now_ns
        return account
