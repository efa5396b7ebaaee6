"""What a step costs by the model's shape, counted by hand."""

from prometheus_client import CollectorRegistry, generate_latest

from services.worker.metrics import WorkerMetrics
from services.worker.models.costs import costs_of
from services.worker.models.registry import translate
from services.worker.models.size import sizes_of
from services.worker.plan import StepResult
from services.worker.work import StepCosts, WorkMeter
from shared.telemetry.metrics import CACHE_CONFIG_INFO
from tests.builders.plans import make_admit, make_plan
from tests.builders.pretend_worker import COSTS, PretendRunner
from tests.builders.scrape import Scrape, parse

PAIRS = StepCosts(
    flops_per_token=0,
    flops_per_logits=0,
    flops_per_pair=1,
    layer_bytes=0,
    head_bytes=0,
    embedding_bytes_per_token=0,
    kv_bytes_per_position=1,
    windows={None: 1},
)


def metered(costs: StepCosts, *plans) -> tuple[int, int]:
    meter = WorkMeter(costs, 4)
    for plan in plans:
        meter.add(plan)
    return meter.flops, meter.read_bytes


PROMPT = make_plan(1, [(0, 5, True, (0,))], [make_admit(0, [1, 2, 3, 4, 5])])
DECODE = make_plan(2, [(0, 1, True, ())])


def test_a_prompt_attends_to_a_triangle_and_a_token_to_all_before_it():
    assert metered(PAIRS, PROMPT) == (15, 5)
    assert metered(PAIRS, PROMPT, DECODE) == (15 + 6, 5 + 6)


def test_a_warm_prefix_is_read_and_not_computed():
    warm = make_plan(1, [(2, 1, True, (0,))], [make_admit(2, [1, 2, 3, 4, 5], computed=4)])
    assert metered(PAIRS, warm) == (5, 5)


def test_a_window_bounds_what_is_seen():
    windowed = StepCosts(**{name: getattr(PAIRS, name) for name in PAIRS.__struct_fields__} | {"windows": {3: 2}})
    assert metered(windowed, PROMPT) == (2 * (1 + 2 + 3 + 3 + 3), 2 * 5)
    assert metered(windowed, PROMPT, DECODE) == (2 * 12 + 2 * 3, 2 * 5 + 2 * 3)


def test_weights_are_read_once_a_step_and_the_head_only_where_it_samples():
    silent = make_plan(1, [(0, 3, False, (0,))], [make_admit(0, [1, 2, 3, 4, 5])])
    flops, read_bytes = metered(COSTS, silent)
    assert flops == 3 * 1000 + 6
    assert read_bytes == 4000 + 3 * 40 + 3 * 4
    flops, read_bytes = metered(COSTS, PROMPT)
    assert flops == 5 * 1000 + 100 + 15
    assert read_bytes == 4000 + 400 + 5 * 40 + 5 * 4


def test_a_models_costs_follow_from_its_shape():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    spec = translate(config).spec
    costs = costs_of(spec, 2)
    matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    norms = 2 * 2 * 8 + 8
    assert sizes_of(spec).total == matrices + 2 * 32 * 8 + norms
    assert (costs.flops_per_token, costs.layer_bytes) == (2 * matrices, 2 * matrices)
    assert (costs.flops_per_logits, costs.head_bytes) == (2 * 32 * 8, 2 * 32 * 8)
    assert (costs.kv_bytes_per_position, dict(costs.windows)) == (2 * 4 * 2, {None: 2})


def test_a_step_that_failed_counts_for_nothing():
    metrics = WorkerMetrics()
    facts = dict.fromkeys(CACHE_CONFIG_INFO.labels, "x")
    metrics.describe(PretendRunner(), COSTS, **facts | {"max_num_seqs": 4, "tables": {}})
    metrics.on_result(PROMPT, StepResult(step=1, error="boom"))
    failed = told(metrics)
    metrics.on_result(PROMPT, StepResult(step=1))
    assert (failed("estimated_flops_total"), told(metrics)("estimated_flops_total")) == (0, 5115)


def told(metrics: WorkerMetrics) -> Scrape:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics.exposition)
    return parse(generate_latest(registry).decode())
