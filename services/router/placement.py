"""Which scheduler a request goes to: a pure function of what is warm where, and of who waits."""

from collections.abc import Sequence

import msgspec

WAITING_TOKENS = 256
"""What one waiting request is taken to cost, in prompt tokens: an average prompt and the wait for its place."""
RUNNING_TOKENS = 32
"""What one running request is taken to cost: it shares every step, and leaves soon."""
FULL_TOKENS = 4096
"""What it costs to go where the KV pool cannot hold the new blocks: somebody is preempted."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One scheduler as a request sees it. `overlap_tokens` of its prompt are warm there.

    `unseen` counts this router's submits that the scheduler's load does not show yet.
    """

    name: str
    overlap_tokens: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    unseen: int = 0
    free_tokens: int = 2**62
    """Tokens that fit into blocks that nobody references."""


class Choice(msgspec.Struct, frozen=True):
    """The winner's place in the list given, and every candidate's cost (for the trace)."""

    index: int
    costs: tuple[int, ...]


def cost(candidate: Candidate, prompt_tokens: int) -> int:
    """Work ahead of the first token, in tokens: what must be computed, and who is before us."""
    computed = max(1, prompt_tokens - candidate.overlap_tokens)
    queue = WAITING_TOKENS * (candidate.requests_waiting + candidate.unseen)
    crowded = FULL_TOKENS if computed > candidate.free_tokens else 0
    return computed + queue + RUNNING_TOKENS * candidate.requests_running + crowded


def choose(candidates: Sequence[Candidate], prompt_tokens: int) -> Choice | None:
    """The cheapest; of equals the one with the most warm, then the least busy, then the first. None without any."""
    if not candidates:
        return None
    costs = tuple(cost(candidate, prompt_tokens) for candidate in candidates)

    def rank(index: int) -> tuple[int, int, int, int]:
        one = candidates[index]
        return (costs[index], -one.overlap_tokens, one.requests_running + one.requests_waiting + one.unseen, index)

    return Choice(min(range(len(candidates)), key=rank), costs)
