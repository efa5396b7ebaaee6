"""In which order requests run: a key made at arrival, smaller first. The largest key is preempted first."""

from typing import Protocol

from shared.clock import NS_PER_S


class Policy(Protocol):
    """A total order over requests that does not change while they live."""

    def order(self, *, arrival: int, priority: int, now_ns: int) -> tuple[float, int]:
        """`arrival` counts requests, and breaks ties."""
        ...


class Fcfs:
    """First come, first served. A preempted request goes back in front of everybody who came after it."""

    def order(self, *, arrival: int, priority: int, now_ns: int) -> tuple[float, int]:
        return (0.0, arrival)


class Priority:
    """Lower priority runs first, and waiting counts: `ageing_s` seconds outweigh one level.

    Of two requests, the one with the smaller `priority - waited / ageing_s` goes first. Both wait at the same rate,
    so the comparison never changes and the key can be fixed at arrival: `priority + arrived / ageing_s`.
    """

    def __init__(self, ageing_s: float = 10.0) -> None:
        self._ageing_s = ageing_s

    def order(self, *, arrival: int, priority: int, now_ns: int) -> tuple[float, int]:
        return (priority + now_ns / NS_PER_S / self._ageing_s, arrival)


POLICIES: dict[str, type[Fcfs] | type[Priority]] = {"fcfs": Fcfs, "priority": Priority}
