"""Every name of a span or an attribute, once. The GenAI conventions moved out of OpenTelemetry's Python package, so
theirs are spelled here too; `sluice.*` are our own."""

SERVICES = {"router": "sluice-router", "scheduler": "sluice-scheduler", "worker": "sluice-worker"}

# Spans. See names.md: one trace per request.
GENERATE, ADMIT, TOKENIZE, ROUTE, SCHEDULE, DELIVER = "generate", "admit", "tokenize", "route", "schedule", "deliver"
LINK, QUEUE, PREFILL, DECODE = "link", "queue", "prefill", "decode"

# OpenTelemetry's.
OPERATION = "gen_ai.operation.name"
REQUEST_MODEL = "gen_ai.request.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
TOP_K = "gen_ai.request.top_k"
SEED = "gen_ai.request.seed"
RESPONSE_ID = "gen_ai.response.id"
FINISH_REASONS = "gen_ai.response.finish_reasons"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
ERROR_TYPE = "error.type"

# What vLLM, SGLang and TensorRT-LLM share, in seconds.
LATENCY_QUEUE = "gen_ai.latency.time_in_queue"
LATENCY_FIRST_TOKEN = "gen_ai.latency.time_to_first_token"
LATENCY_E2E = "gen_ai.latency.e2e"
LATENCY_PREFILL = "gen_ai.latency.time_in_model_prefill"
LATENCY_DECODE = "gen_ai.latency.time_in_model_decode"

# Ours.
REQUEST_ID = "sluice.request.id"
NUM_SAMPLES = "sluice.request.n"
PRIORITY = "sluice.request.priority"
DETERMINISTIC = "sluice.request.deterministic"
END = "sluice.request.end"
PREEMPTIONS = "sluice.preemptions"
CANDIDATES = "sluice.route.candidates"
COSTS = "sluice.route.costs"
CHOSEN = "sluice.route.scheduler"
WARM_TOKENS = "sluice.route.warm_tokens"
WAIT_REASON = "sluice.queue.reason"
WAIT_MS = "sluice.queue.{}_ms"
STEPS = "sluice.steps"
CHUNKS = "sluice.prefill.chunks"
COMPUTED_TOKENS = "sluice.prefill.computed_tokens"
PREFILL_CACHED_TOKENS = "sluice.prefill.cached_tokens"
DEVICE_MS = "sluice.device_ms"
BATCH_MEAN = "sluice.batch_size_mean"
DECODE_TOKENS = "sluice.decode.tokens"
"""Of the whole request, on its last stretch of decoding."""
BLOCKED_MS = "sluice.client.blocked_ms"
"""How long its answers waited for a client that did not read."""
