"""Every metric that is exported: its name, kind, labels and buckets, once, and which service exports it.

The stems are vLLM's, so that dashboards port by search and replace. A metric is exported by one service alone, but for
`loop_lag_seconds`, which every process says of its own event loop (Prometheus' `job` label tells them apart). Names of
counters end in `_total` here, as users read them.
"""

from typing import Literal

import msgspec

PREFIX = "sluice:"

Kind = Literal["counter", "gauge", "histogram"]


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One metric. `name` is without the prefix; `buckets` are upper bounds, included, without infinity."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind="histogram", help=help, buckets=buckets)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", help=help, labels=labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", help=help, labels=labels)


# fmt: off
FIRST_TOKEN_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_BUCKETS = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (
    .0005, .001, .0025, .005, .01, .025, .05, .1, .2,  # ours; the others are vLLM's
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
TOKENS_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_BUCKETS = (.0005, .001, .0025, .005, .0075, .01, .015, .02, .03, .05, .075, .1, .2, .5, 1, 2.5, 5, 10, 30)
PAUSE_BUCKETS = (
    .00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10,
)
# fmt: on

# Of requests, at the edge.
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From a request's arrival at the router to its first delta on the way to the client.",
    FIRST_TOKEN_BUCKETS,
)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency_seconds",
    "Between two deltas of one sample, as they are handed to the client.",
    BETWEEN_TOKENS_BUCKETS,
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "request_time_per_output_token_seconds",
    "Of a sample with two tokens or more: from its first delta to its last, per token after the first.",
    BETWEEN_TOKENS_BUCKETS,
)
E2E_LATENCY = _histogram(
    "e2e_request_latency_seconds",
    "From arrival to end, of every request that was not refused at admission, however it ended.",
    REQUEST_BUCKETS,
)
QUEUE_TIME = _histogram(
    "request_queue_time_seconds",
    "What a request waited in a scheduler's queue in all, preemptions included.",
    REQUEST_BUCKETS,
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "What a request spent in prefill, of those that reached it.", REQUEST_BUCKETS
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", "What a request spent in decode, of those that reached it.", REQUEST_BUCKETS
)
REQUEST_PROMPT_TOKENS = _histogram(
    "request_prompt_tokens", "Prompt tokens of a request that was sent to a scheduler and taken.", TOKENS_BUCKETS
)
REQUEST_GENERATION_TOKENS = _histogram(
    "request_generation_tokens", "Tokens generated for such a request, by all its samples.", TOKENS_BUCKETS
)
PROMPT_TOKENS = _counter("prompt_tokens_total", "Prompt tokens of requests that got their first token.")
GENERATION_TOKENS = _counter("generation_tokens_total", "Tokens generated, as they reach the router.")
PROMPT_TOKENS_CACHED = _counter(
    "prompt_tokens_cached_total", "Prompt tokens that were found in the prefix cache, counted when a request ends."
)
REQUEST_SUCCESS = _counter(
    "request_success_total",
    "Samples that ended, of requests that were not refused at admission: by stop, length, abort or error.",
    "finished_reason",
)
ADMISSION_REJECTIONS = _counter(
    "admission_rejections_total", "Requests refused before they began, by the name of the refusal.", "reason"
)
SPANS_DROPPED = _counter("spans_dropped_total", "Spans that no collector took: the queue was full, or sending failed.")

# Of the queue, the blocks and the steps: the scheduler's.
NUM_RUNNING = _gauge("num_requests_running", "Samples that hold a slot.")
NUM_WAITING = _gauge("num_requests_waiting", "Samples that wait for one.")
NUM_WAITING_BY_REASON = _gauge("num_requests_waiting_by_reason", "Samples that wait, by what they wait for.", "reason")
KV_CACHE_USAGE = _gauge("kv_cache_usage_perc", "The share of KV blocks that samples hold; 1 is all of them.")
KV_BLOCKS = _gauge("kv_blocks", "KV blocks by state: free, cached (evicted when needed) or referenced.", "state")
PREFIX_CACHE_QUERIES = _counter(
    "prefix_cache_queries_total",
    "Known tokens of samples when they were first admitted, looked up in the prefix cache.",
)
PREFIX_CACHE_HITS = _counter("prefix_cache_hits_total", "Of those, the tokens that were found.")
NUM_PREEMPTIONS = _counter(
    "num_preemptions_total",
    "Samples put back into the queue: blocks ran out, a step failed, a worker was lost.",
    "reason",
)
ITERATION_TOKENS = _histogram("iteration_tokens_total", "Tokens that a step computes.", STEP_TOKENS_BUCKETS)
STEP_TIME = _histogram("step_seconds", "How long a worker ran a step, as it says.", STEP_BUCKETS)
STEP_GAP = _histogram(
    "step_gap_seconds",
    "Between two results of a worker that had work all the time: what was not running the later step.",
    PAUSE_BUCKETS,
)
LOOP_LAG = _histogram(
    "loop_lag_seconds", "How much later than asked for a timer of this process's event loop ran.", PAUSE_BUCKETS
)
ABORT_TO_FREE = _histogram(
    "abort_to_free_seconds",
    "From an abort's arrival to the end of the last step in flight that computed for the sample.",
    PAUSE_BUCKETS,
)
ABORTS = _counter("aborts_total", "Samples ended early, by the phase that they were in.", "phase")
MIGRATIONS = _counter(
    "migrations_total",
    "Samples of a lost worker: moved to another one, or failed because there was none.",
    "result",
)
KV_INVARIANT_VIOLATIONS = _counter("kv_invariant_violations_total", "Contradictions found in the scheduler's books.")
HEARTBEAT_AGE = _gauge("heartbeat_age_seconds", "Since a worker was last heard of: a renewal or a result.", "worker")

# Of the device: the worker's.
CACHE_CONFIG_INFO = _gauge(
    "cache_config_info",
    "1, with the KV cache's settings as labels.",
    "block_size",
    "num_gpu_blocks",
    "block_bytes",
    "cache_dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "gpu_memory_utilization",
)
ESTIMATED_FLOPS = _counter("estimated_flops_total", "Operations that the finished steps took, by the model's shape.")
ESTIMATED_READ_BYTES = _counter(
    "estimated_read_bytes_total", "Bytes of weights and KV that the finished steps read at least, by the model's shape."
)
LATE_COMPILATIONS = _counter(
    "late_compilations_total", "Kernels of a GPU that were compiled in live traffic, each while a step waited for it."
)
PRODUCT_TABLES = _counter(
    "product_tables_total",
    "Tables of measured matrix products that do not fit: another Triton's (used), or refused (defaults instead).",
    "verdict",
)

EXPORTED: dict[str, tuple[Metric, ...]] = {
    "router": (
        TIME_TO_FIRST_TOKEN,
        INTER_TOKEN_LATENCY,
        TIME_PER_OUTPUT_TOKEN,
        E2E_LATENCY,
        QUEUE_TIME,
        PREFILL_TIME,
        DECODE_TIME,
        REQUEST_PROMPT_TOKENS,
        REQUEST_GENERATION_TOKENS,
        PROMPT_TOKENS,
        GENERATION_TOKENS,
        PROMPT_TOKENS_CACHED,
        REQUEST_SUCCESS,
        ADMISSION_REJECTIONS,
        SPANS_DROPPED,
        LOOP_LAG,
    ),
    "scheduler": (
        NUM_RUNNING,
        NUM_WAITING,
        NUM_WAITING_BY_REASON,
        KV_CACHE_USAGE,
        KV_BLOCKS,
        PREFIX_CACHE_QUERIES,
        PREFIX_CACHE_HITS,
        NUM_PREEMPTIONS,
        ITERATION_TOKENS,
        STEP_TIME,
        STEP_GAP,
        LOOP_LAG,
        ABORT_TO_FREE,
        ABORTS,
        MIGRATIONS,
        KV_INVARIANT_VIOLATIONS,
        HEARTBEAT_AGE,
    ),
    "worker": (
        CACHE_CONFIG_INFO,
        ESTIMATED_FLOPS,
        ESTIMATED_READ_BYTES,
        LATE_COMPILATIONS,
        PRODUCT_TABLES,
        SPANS_DROPPED,
        LOOP_LAG,
    ),
}
