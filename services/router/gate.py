"""Who may call: API keys, hashed where they are kept, and what each may use. Both doors ask here before anything else.

Without a key configured the gate is open and everyone is the same tenant.
"""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
import structlog

from shared.clock import NS_PER_S, NowNs
from shared.config import ConfigError
from shared.outcome import refuse

log = structlog.get_logger("gate")

RELOAD_NS = NS_PER_S
"""The file is looked at so often, while somebody calls."""
LONGEST_KEY = 1024
Limit = Annotated[int, msgspec.Meta(ge=0)]
Priority = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
ANY_PRIORITY = -(2**31)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What the holder of a key may do. 0 is without a limit."""

    name: str = ""
    tenant: str = ""
    """Whose requests these are: request ids and cached blocks are a tenant's own."""
    admin: bool = False
    """Whether it opens Control, /metrics and /cluster, which tell of everybody."""
    max_requests: int = 0
    """In flight at once."""
    max_request_bytes: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers together."""
    min_priority: int = ANY_PRIORITY
    """The lowest `priority` of its requests, which is the most urgent: lower runs first."""

    @property
    def salt(self) -> bytes:
        """Of the block hashes of what it asks for."""
        return self.tenant.encode()

    def largest(self, max_request_bytes: int) -> int:
        """The most bytes of a request, where the router takes so many."""
        return min(max_request_bytes, self.max_request_bytes or max_request_bytes)

    def priority(self, asked: int) -> int:
        """Of a request that asks for this one; 0, as if unset, gets the lowest from 0 on that the key may have. Raises
        RefusedError permission_denied for one that is lower than the key's lowest."""
        if asked and asked < self.min_priority:
            message = (
                f"priority: {asked} is more urgent than this API key may ask for; its lowest is {self.min_priority}"
            )
            raise refuse("permission_denied", message, field="priority")
        return max(asked, self.min_priority)


PUBLIC = Key(admin=True)
"""Everyone, where no key is configured."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file, under the key's name."""

    sha256: str
    tenant: str = ""
    admin: bool = False
    max_requests: Limit = 0
    max_request_bytes: Limit = 0
    tokens_per_minute: Limit = 0
    min_priority: Priority = ANY_PRIORITY


class Gate:
    """Knows keys by their SHA-256. The file is read again when it changes."""

    def __init__(self, api_key: str, file: str, now: NowNs) -> None:
        """`api_key` is one key that may do everything. Raises ConfigError."""
        self._own = {_digest(api_key): Key(name="--api-key", admin=True)} if api_key else {}
        self._file = Path(file) if file else None
        self._now = now
        self._looked_ns = now()
        self._seen: tuple[int, int] | None = None
        self._keys = dict(self._own)
        if self._file is not None:
            self._seen = _version(self._file)
            self._keys |= _load(self._file)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._own and self._file is None

    def key_of(self, authorization: str, *, admin: bool = False) -> Key:
        """Whose call it is, by its `authorization: Bearer …`. Raises RefusedError: unauthenticated, or
        permission_denied where `admin` is needed and the key is not one."""
        if self.is_open:
            return PUBLIC
        self._reload()
        scheme, _, secret = authorization.partition(" ")
        key = None
        if scheme.lower() == "bearer" and 0 < len(secret) <= LONGEST_KEY:
            key = self._keys.get(_digest(secret.strip()))
        if key is None:
            raise refuse("unauthenticated", "the API key is missing or wrong; send `authorization: Bearer KEY`")
        if admin and not key.admin:
            raise refuse("permission_denied", "this key may not; it needs `admin = true`")
        return key

    def _reload(self) -> None:
        """A file that cannot be read leaves the keys as they were."""
        if self._file is None or self._now() - self._looked_ns < RELOAD_NS:
            return
        self._looked_ns = self._now()
        try:
            seen = _version(self._file)
            if seen != self._seen:
                self._seen = seen
                self._keys = {**self._own, **_load(self._file)}
                log.info("keys_loaded", file=str(self._file), keys=len(self._keys))
        except ConfigError as error:
            log.error("keys_not_loaded", reason=str(error), effect="the keys stay as they were")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _version(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise ConfigError(f"--api-key-file: cannot read {file}: {error.strerror}") from None
    return stat.st_mtime_ns, stat.st_size


def _load(file: Path) -> dict[str, Key]:
    try:
        entries = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), dict[str, _Entry])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"--api-key-file: cannot use {file}: {error}") from None
    keys: dict[str, Key] = {}
    for name, entry in entries.items():
        if not _SHA256.fullmatch(entry.sha256):
            raise ConfigError(f"--api-key-file: {file}: [{name}] sha256 is not 64 hexadecimal digits, small letters")
        if entry.sha256 in keys:
            raise ConfigError(f"--api-key-file: {file}: [{name}] and [{keys[entry.sha256].name}] are the same key")
        facts = msgspec.structs.asdict(entry)
        del facts["sha256"]
        keys[entry.sha256] = Key(name=name, **{**facts, "tenant": entry.tenant or name})
    return keys
