"""What steps cost by the model's shape: operations, and bytes that must be read at the least. Torch-free."""

from collections.abc import Mapping

import msgspec
import numpy as np

from services.worker.plan import Array, StepPlan


class StepCosts(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's costs. An attended pair is a query and one position that it sees, in one layer.

    `windows` counts the layers that see so many positions; None: all of them.
    """

    flops_per_token: int
    flops_per_logits: int
    """Of one row of logits."""
    flops_per_pair: int
    layer_bytes: int
    """Weights of all layers, which every step reads once."""
    head_bytes: int
    """Read once by a step that samples."""
    embedding_bytes_per_token: int
    kv_bytes_per_position: int
    """K and V of one position in one layer."""
    windows: Mapping[int | None, int]


class WorkMeter:
    """Adds up what finished steps cost. Owned by the event loop, which hears of results in the order of their plans."""

    def __init__(self, costs: StepCosts, max_num_seqs: int) -> None:
        self.flops = 0
        self.read_bytes = 0
        self._costs = costs
        self._contexts = np.zeros(max_num_seqs, np.int64)
        """By slot: positions that stand in its cache."""

    def add(self, plan: StepPlan) -> None:
        """Takes about 12 µs for 64 rows. Logits of prompts whose logprobs are asked for are not counted."""
        for admit in plan.admits:
            self._contexts[admit.slot] = admit.computed
        before = self._contexts[plan.slots]
        after = before + plan.counts
        self._contexts[plan.slots] = after
        costs, tokens, logits = self._costs, int(plan.counts.sum()), int(plan.samples.sum())
        pairs = read = 0
        for window, num_layers in costs.windows.items():
            pairs += num_layers * int((_pairs_until(after, window) - _pairs_until(before, window)).sum())
            read += num_layers * int(_seen(after, plan.counts, window).sum())
        self.flops += tokens * costs.flops_per_token + logits * costs.flops_per_logits + pairs * costs.flops_per_pair
        self.read_bytes += costs.layer_bytes + (costs.head_bytes if logits else 0)
        self.read_bytes += tokens * costs.embedding_bytes_per_token + read * costs.kv_bytes_per_position


def _pairs_until(length: Array, window: int | None) -> Array:
    """Pairs of the first `length` queries of a sequence: 1 + 2 + 3 + …, each at most `window`."""
    ramp = length if window is None else np.minimum(length, window)
    flat = 0 if window is None else np.maximum(length - window, 0) * window
    return ramp * (ramp + 1) // 2 + flat


def _seen(after: Array, counts: Array, window: int | None) -> Array:
    """Positions that a row's queries see between them: each is read once at the least."""
    return after if window is None else np.minimum(after, window + counts - 1)
