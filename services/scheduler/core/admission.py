"""What is refused before it waits: what can never fit, what comes too late, and what is one too many."""

import msgspec

from services.scheduler.core.request import Submission
from services.scheduler.core.worker_group import WorkerGroup
from shared.clock import NS_PER_MS
from shared.outcome import Refusal

RETRY_MS = (100, 30_000)
"""Bounds of the retry delay that a full queue suggests."""
NO_WORKER_RETRY_MS = 1_000


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of the scheduler. `max_model_len` 0 leaves it to the workers."""

    max_num_queued_reqs: int = 2048
    max_model_len: int = 0

    def model_len(self, groups: list[WorkerGroup]) -> int:
        """The most known tokens of a sample on these groups."""
        longest = max(group.spec.max_model_len for group in groups)
        return min(self.max_model_len, longest) if self.max_model_len else longest


def refuse_submission(
    submission: Submission,
    groups: list[WorkerGroup],
    num_waiting: int,
    limits: Limits,
    order: tuple[float, int],
    now_ns: int,
) -> Refusal | None:
    """The refusal of a request that can never run, or not in time; None for one to take. `order` is its policy key."""
    if not groups:
        return Refusal(
            name="no_worker", message="no worker is ready; try again soon", retry_after_ms=NO_WORKER_RETRY_MS
        )
    if num_waiting >= limits.max_num_queued_reqs:
        return Refusal(
            name="queue_full",
            message=f"{num_waiting} samples wait already; try again later",
            retry_after_ms=retry_after_ms(groups),
        )
    return _refuse_length(submission, groups, limits) or _refuse_deadline(submission, groups, order, now_ns)


def longest_sample(submission: Submission, groups: list[WorkerGroup], limits: Limits) -> int:
    """Known tokens at which a sample must end: by its own limit, the model's, and the largest pool's."""
    largest = max(group.longest + 1 for group in groups)
    longest = min(limits.model_len(groups), largest)
    max_tokens = submission.stopping.max_tokens
    return min(longest, len(submission.token_ids) + max_tokens) if max_tokens else longest


def retry_after_ms(groups: list[WorkerGroup]) -> int:
    """When a place should be free, from the waiting tokens and the measured pace."""
    estimate_ns = min(group.pace.estimate_ns(group.waiting.tokens, 1) for group in groups)
    low, high = RETRY_MS
    return int(min(max(estimate_ns / NS_PER_MS, low), high))


def _refuse_length(submission: Submission, groups: list[WorkerGroup], limits: Limits) -> Refusal | None:
    prompt, output = len(submission.token_ids), submission.stopping.max_tokens
    wanted = prompt + max(output, 1)
    max_model_len = limits.model_len(groups)
    if prompt == 0:
        return Refusal(name="invalid_argument", message="the prompt has no tokens", field="input")
    if wanted > max_model_len:
        return Refusal(
            name="prompt_too_long",
            message=f"{prompt} prompt tokens and {max(output, 1)} to generate exceed the model's maximum of "
            f"{max_model_len}; shorten the prompt or lower max_tokens",
            field="stopping.max_tokens" if prompt < max_model_len else "input",
        )
    if not any(group.fits(wanted) for group in groups):
        largest = max(group.longest for group in groups)
        return Refusal(
            name="exceeds_kv_pool",
            message=f"{prompt} prompt tokens and {max(output, 1)} to generate can never fit the KV pool of {largest} "
            "tokens; shorten the request or give the worker more memory (--kv-cache-memory-bytes)",
            field="stopping.max_tokens",
        )
    return None


def _refuse_deadline(
    submission: Submission, groups: list[WorkerGroup], order: tuple[float, int], now_ns: int
) -> Refusal | None:
    if not submission.deadline_ns:
        return None
    left_ns = submission.deadline_ns - now_ns
    stopping = submission.stopping
    may_end_early = stopping.stop_token_ids or stopping.stops_on_text
    steps = max(1, stopping.min_tokens, 0 if may_end_early else stopping.max_tokens)
    # A warm prefix may spare the whole prompt, so only decoding and what goes before it are certain.
    needed_ns = min(group.pace.estimate_ns(group.waiting.tokens_before(order), steps) for group in groups)
    if left_ns > 0 and needed_ns <= left_ns:
        return None
    return Refusal(
        name="deadline_unreachable",
        message=f"the deadline is {max(left_ns, 0) // NS_PER_MS} ms away and this needs at least "
        f"{int(needed_ns) // NS_PER_MS} ms; allow more time or ask for fewer tokens",
    )
