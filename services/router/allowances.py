"""What each API key has in use, and what is left of its tokens."""

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
    """Accounts by the key's name, begun when it is first used. Keys without limits have none."""

    def __init__(self, now: NowNs) -> None:
        self._now = now
        self._accounts: dict[str, _Account] = {}

    def enter(self, key: Key) -> None:
        """A request begins. Raises RefusedError quota_exceeded, which says when to try again."""
        account = self._account(key)
        if account is None:
            return
        if key.max_requests and account.in_flight >= key.max_requests:
            message = f"{key.max_requests} requests of this API key are in flight"
            raise refuse("quota_exceeded", message, retry_after_ms=BUSY_RETRY_MS)
        if key.tokens_per_minute and account.tokens <= 0:
            wait_ms = int((1 - account.tokens) * SECONDS * 1000 / key.tokens_per_minute) + 1
            message = f"this API key has used its {key.tokens_per_minute} tokens a minute"
            raise refuse("quota_exceeded", message, retry_after_ms=wait_ms)
        account.in_flight += 1

    def leave(self, key: Key) -> None:
        """It ended."""
        account = self._account(key)
        if account is not None:
            account.in_flight -= 1

    def spend(self, key: Key, tokens: int) -> None:
        """What it took, once that is known."""
        account = self._account(key)
        if account is not None:
            account.tokens -= tokens

    def _account(self, key: Key) -> _Account | None:
        """With the tokens that time has brought back."""
        if not key.max_requests and not key.tokens_per_minute:
            return None
        now_ns = self._now()
        account = self._accounts.setdefault(key.name, _Account(tokens=key.tokens_per_minute, at_ns=now_ns))
        grown = (now_ns - account.at_ns) / NS_PER_S * key.tokens_per_minute / SECONDS
        account.tokens, account.at_ns = min(key.tokens_per_minute, account.tokens + grown), now_ns
        return account
