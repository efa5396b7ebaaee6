"""A client's deadline as a duration."""

import grpc

from shared.clock import NS_PER_S

LONGEST_S = 365 * 24 * 3600.0
"""gRPC reports absurdly large values for a call without a deadline."""


def remaining_ns(context: grpc.aio.ServicerContext) -> int | None:
    """Nanoseconds until the caller gives up; None without a deadline. At least 1 when already past."""
    remaining_s = context.time_remaining()
    if remaining_s is None or remaining_s > LONGEST_S:
        return None
    return max(1, int(remaining_s * NS_PER_S))
