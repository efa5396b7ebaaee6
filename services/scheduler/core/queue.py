"""Samples in the order of their policy key: those that wait, and those that run."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.scheduler.core.request import Sample


def _order(sample: Sample) -> tuple[float, int, int]:
    return sample.order


@dataclass(slots=True)
class OrderedSamples:
    """A sorted list; `tokens` sums what its samples had to compute when they entered (`backlog`)."""

    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def add(self, sample: Sample) -> None:
        self.tokens += sample.backlog
        if self.samples and self.samples[-1].order > sample.order:
            insort(self.samples, sample, key=_order)
        else:
            self.samples.append(sample)

    def remove(self, sample: Sample) -> None:
        """Raises KeyError for a sample that is not here."""
        place = bisect_left(self.samples, sample.order, key=_order)
        if place == len(self.samples) or self.samples[place] is not sample:
            raise KeyError(sample)
        del self.samples[place]
        self.tokens -= sample.backlog

    @property
    def first(self) -> Sample | None:
        return self.samples[0] if self.samples else None
