"""Channel and server options, in one place. lessons: a test shows that each has its effect."""

INTERNAL_MESSAGE_BYTES = 16 * 2**20
"""gRPC's default of 4 MiB would kill a whole link; senders split at SPLIT_BYTES."""
SPLIT_BYTES = 1 * 2**20
"""What a sender splits at, towards clients too: those have that default."""

MAX_PENDING_CALLS = 100_000
"""Calls that have arrived and that Python has not seen yet."""

Options = list[tuple[str, int]]


def server_options(*, max_receive_bytes: int, reuse_port: bool = False) -> Options:
    """Options of any server of ours. Without `so_reuseport=0` a second server would share the port silently."""
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        # Python takes calls in one by one: of a crowd that arrives at once gRPC would cancel some beyond 1,000, with no
        # reason given. Who is too many is for the router to say.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def internal_channel_options() -> Options:
    """Options of a link between our services: a frozen peer is noticed in about two seconds, a restarted one soon."""
    return [
        ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 1_000),
        ("grpc.http2.ping_timeout_ms", 2_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
