"""Samples in the order of their policy key: those that wait, and those that run."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from services.scheduler.core.request import Sample


def _order(sample: Sample) -> tuple[float, int, int]:
    return sample.order


@dataclass(slots=True)
class OrderedSamples:
    """A sorted list; `tokens` is the sum of what its samples have yet to compute, when they entered."""

    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    _weights: dict[Sample, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def add(self, sample: Sample) -> None:
        weight = len(sample.tokens) - sample.computed
        self._weights[sample] = weight
        self.tokens += weight
        if self.samples and self.samples[-1].order > sample.order:
            insort(self.samples, sample, key=_order)
        else:
            self.samples.append(sample)

    def remove(self, sample: Sample) -> None:
        """Raises KeyError for a sample that is not here."""
        self.tokens -= self._weights.pop(sample)
        place = bisect_left(self.samples, sample.order, key=_order)
        del self.samples[place]

    @property
    def first(self) -> Sample | None:
        return self.samples[0] if self.samples else None

    @property
    def last(self) -> Sample | None:
        return self.samples[-1] if self.samples else None
