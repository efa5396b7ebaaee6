"""Samples in the order of their policy key: those that wait, and those that run."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.scheduler.core.request import Sample


def _order(sample: Sample) -> tuple[float, int, int]:
    return sample.order


def _arrival(sample: Sample) -> int:
    return sample.request.order[1]


@dataclass(slots=True)
class OrderedSamples:
    """A sorted list; `tokens` sums what its samples had to compute when they entered (`backlog`)."""

    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    newest: int = -1
    """The latest arrival that was ever added."""
    moved: bool = False
    """Some sample may have been put before one that came earlier, or left from there."""

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def add(self, sample: Sample) -> None:
        self.tokens += sample.backlog
        if self.samples and self.samples[-1].order > sample.order:
            insort(self.samples, sample, key=_order)
            self.moved = True
        else:
            self.samples.append(sample)
        self.moved = self.moved or _arrival(sample) < self.newest
        self.newest = max(self.newest, _arrival(sample))

    def remove(self, sample: Sample) -> None:
        """Raises KeyError for a sample that is not here."""
        place = bisect_left(self.samples, sample.order, key=_order)
        if place == len(self.samples) or self.samples[place] is not sample:
            raise KeyError(sample)
        del self.samples[place]
        if place < len(self.samples) and _arrival(self.samples[place]) < _arrival(sample):
            self.moved = True
        self.tokens -= sample.backlog

    def tokens_before(self, order: tuple[float, int]) -> int:
        """What the samples have to compute that go before a request of this order."""
        place = bisect_left(self.samples, (*order, 0), key=_order)
        return self.tokens if place == len(self.samples) else sum(sample.backlog for sample in self.samples[:place])

    def overtaken(self) -> Iterator[tuple[Sample, bool]]:
        """Each sample, and whether one of a request that came later stands before it; nothing where that can not have
        changed since this was asked last."""
        if not self.moved:
            return
        self.moved, latest = False, -1
        for sample in self.samples:
            yield sample, _arrival(sample) < latest
            latest = max(latest, _arrival(sample))

    @property
    def first(self) -> Sample | None:
        return self.samples[0] if self.samples else None
