"""Which grammars a worker group has compiled for the samples that are there. Each is asked for with the first sample
that needs it, and forgotten with the last."""

from dataclasses import dataclass, field

import msgspec

from shared.structured import Structured


class Prepare(msgspec.Struct, frozen=True):
    """The worker is to compile a grammar; plans name it by `id` once it is ready."""

    id: int
    structured: Structured


class Forget(msgspec.Struct, frozen=True):
    """No later plan names this grammar."""

    id: int


MOST_HELD = 128
"""Different grammars that a worker holds at once; a compiled one may take a megabyte. Others wait for a place."""


@dataclass(slots=True)
class _Entry:
    """`id` 0: it is not asked for yet."""

    id: int = 0
    num_samples: int = 0
    ready: bool = False


@dataclass(slots=True)
class Grammars:
    """Owns the ids, and what is to be told to the worker. Knows no samples, only how many need what."""

    commands: list[Prepare | Forget] = field(default_factory=list)
    _entries: dict[Structured, _Entry] = field(default_factory=dict)
    _last_id: int = 0
    _num_held: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    def join(self, structured: Structured | None) -> None:
        """One more sample of the group needs it."""
        if structured is None:
            return
        if structured not in self._entries:
            self._entries[structured] = _Entry()
            self._ask()
        self._entries[structured].num_samples += 1

    def leave(self, structured: Structured | None) -> None:
        """One sample fewer does."""
        if structured is None:
            return
        entry = self._entries[structured]
        entry.num_samples -= 1
        if not entry.num_samples:
            del self._entries[structured]
            if entry.id:
                self._num_held -= 1
                self.commands.append(Forget(entry.id))
            self._ask()

    def num_samples(self, structured: Structured) -> int:
        entry = self._entries.get(structured)
        return entry.num_samples if entry else 0

    def is_ready(self, structured: Structured | None) -> bool:
        """Whether a plan may admit a sample that needs it."""
        entry = None if structured is None else self._entries.get(structured)
        return structured is None or (entry is not None and entry.ready)

    def id_of(self, structured: Structured | None) -> int:
        """0: none."""
        return 0 if structured is None else self._entries[structured].id

    def settle(self, grammar_id: int) -> Structured | None:
        """The worker has answered for it: from now on it is ready. None for one that nobody needs any more."""
        for structured, entry in self._entries.items():
            if entry.id == grammar_id:
                entry.ready = True
                return structured
        return None

    def ask_again(self) -> None:
        """The worker has dropped them all."""
        self.commands.clear()
        self._num_held = 0
        for entry in self._entries.values():
            entry.id, entry.ready = 0, False
        self._ask()

    def drain(self) -> list[Prepare | Forget]:
        """What the worker is to be told since the last call, in order, ahead of the plans that follow."""
        commands, self.commands = self.commands, []
        return commands

    def _ask(self) -> None:
        """For those that were not asked for, the oldest first, while there is a place."""
        if self._num_held == min(len(self._entries), MOST_HELD):
            return
        for structured, entry in self._entries.items():
            if not entry.id and self._num_held < MOST_HELD:
                self._last_id += 1
                self._num_held += 1
                entry.id = self._last_id
                self.commands.append(Prepare(entry.id, structured))
