"""Decode steps on fixed buffers, as CUDA graphs hold them: the same function is called again on the same buffers."""

import gc
import random

import pytest
import torch

from kernels.fused import attention, launch
from kernels.ops import choice
from services.worker import load
from services.worker.execute import graphs, mixed_graphs
from services.worker.execute.graphs import buckets_upto, exact_buckets_upto
from services.worker.execute.runner import Runner
from services.worker.memory.budget import Memory
from services.worker.memory.layout import layout_of
from services.worker.models.decoder import load_decoder
from services.worker.plan import StepPlan
from services.worker.rehearsal import measure_steps
from shared.checkpoint import open_checkpoint
from shared.config import WorkerConfig
from tests.builders.plans import make_admit, make_plan
from tests.builders.runners import LateCopies, answer_all, make_asked, make_runner
from tests.models.twins import make_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CalledAgain:
    """Calls what a graph would have recorded. `captured` counts functions, `replayed` calls."""

    def __init__(self):
        self.captured, self.replayed = 0, 0

    def capture(self, function):
        self.captured += 1

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(choice, "is_fused", lambda tensor: True)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return lambda name: load_decoder(open_checkpoint(make_twin(name, folder)), torch.bfloat16, DEVICE)


def graphed(decoder, *, max_num_tokens=0, **fields):
    runner = make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=DEVICE, **fields)
    capture = CalledAgain()
    runner.capture_graphs(decoder, capture, max_num_tokens=max_num_tokens)
    return runner, capture


def admitted(rng, lengths, num_groups=1):
    """Prompts of these lengths in slots 5, 4, …, each in blocks of its own."""
    admits, rows, block = [], [], 0
    for i, length in enumerate(lengths):
        blocks = tuple(range(block, block + -(-(length + 3) // 8)))
        block += len(blocks)
        admits.append(make_admit(5 - i, [rng.randint(2, 380) for _ in range(length)]))
        rows.append((5 - i, length, True, blocks))
    return make_plan(1, rows, admits, num_groups=num_groups), [(slot, 1, True, ()) for slot, *_ in rows]


def logits_of(runner, plans: list[StepPlan]):
    """The logits that each plan's rows were sampled from."""
    seen, sample = [], runner._sampler.sample

    def noted(logits, *rest):
        seen.append(logits.clone())
        return sample(logits, *rest)

    runner._sampler.sample = noted
    begun = []
    for plan in plans:
        begun.append(runner.begin(plan))
        if len(begun) == 2:
            runner.finish(begun.pop(0))
    runner.finish(begun.pop())
    return seen


@pytest.mark.parametrize(("name", "num_rows"), [("llama", 1), ("llama", 4), ("qwen3", 3), ("qwen2-window", 2)])
def test_logits_of_a_replayed_step_are_those_of_an_eager_one(decoders, name, num_rows):
    decoder, rng = decoders(name), random.Random(num_rows)
    groups = decoder.num_groups
    prompts, decodes = admitted(rng, [rng.randint(1, 20) for _ in range(num_rows)], groups)
    plans = [prompts, make_plan(2, decodes, num_groups=groups), make_plan(3, decodes[::-1], num_groups=groups)]
    runner, capture = graphed(decoder)
    replayed = logits_of(runner, plans)
    eager = logits_of(make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=DEVICE), plans)
    assert capture.replayed == 2
    for mine, theirs in zip(replayed, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
        if num_rows in buckets_upto(6):
            assert torch.equal(mine, theirs), "as many rows take the same kernels"


MIXED = {
    "one prompt": [(5, 15, True, (0, 1))],
    "a chunk without its end": [(5, 9, False, (0, 1)), (4, 3, True, (2,))],
    "two prompts": [(5, 6, True, (0,)), (4, 9, True, (1, 2))],
}


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
@pytest.mark.parametrize("case", MIXED)
def test_logits_of_a_replayed_step_with_prompt_tokens_are_those_of_an_eager_one(decoders, name, case, monkeypatch):
    """Then the next tokens of all rows beside a new prompt, while the first step is still unread."""
    monkeypatch.setattr(mixed_graphs, "BUCKETS", (8, 16, 32))
    decoder, rng = decoders(name), random.Random(len(case))
    rows = MIXED[case]
    prompts = {
        slot: [rng.randint(2, 380) for _ in range(15 if not samples else count)] for slot, count, samples, _ in rows
    }
    groups = decoder.num_groups
    first = make_plan(1, rows, [make_admit(slot, prompt) for slot, prompt in prompts.items()], num_groups=groups)
    after = [(slot, 1, samples, ()) for slot, _, samples, _ in rows]
    second = make_plan(2, [*after, (0, 5, True, (6,))], [make_admit(0, [7, 8, 9, 10, 11])], num_groups=groups)
    runner, capture = graphed(decoder, max_num_tokens=16)
    replayed = logits_of(runner, [first, second])
    assert capture.replayed == 2
    eager = logits_of(make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=DEVICE), [first, second])
    for mine, theirs in zip(replayed, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_steps_with_more_rows_tokens_or_wishes_than_a_graph_holds_run_eagerly(decoders):
    decoder = decoders("llama")
    runner, capture = graphed(decoder, max_num_tokens=16)
    for plan in (
        make_plan(1, [(5, 16, True, (0, 1))], [make_admit(5, list(range(16)))]),
        make_plan(2, [(4, 3, True, (2,))], [make_admit(4, [1, 2, 3], prompt_logprobs=1)]),
        make_plan(3, [(3, 3, True, (3,))], [make_admit(3, [1, 2, 3])], exact=True),
    ):
        runner.run(plan)
    assert capture.replayed == 0
    runner.run(make_plan(4, [(2, 15, True, (4, 5))], [make_admit(2, list(range(15)))]))
    assert capture.replayed == 1


def test_padding_rows_write_no_page_and_disturb_no_row(decoders):
    decoder, rng = decoders("llama"), random.Random(0)
    prompts, decodes = admitted(rng, [7, 20, 12])
    runner, _ = graphed(decoder)
    runner.run(prompts)
    before = runner._pages.clone()
    runner._graphs._numbers.fill_(3)  # what an earlier step may have left behind
    runner.run(make_plan(2, decodes))
    changed = (runner._pages != before).flatten(1).any(dim=1).nonzero().flatten().tolist()
    tables = runner._slots.block_table[0]
    assert changed == sorted(int(tables[slot, length // 8]) for slot, length in ((5, 7), (4, 20), (3, 12)))


def test_answers_of_a_soak_with_graphs_are_those_without(decoders):
    """The same plans to both. Greedy tokens of a bfloat16 twin may part where two logits are near: one request may."""
    decoder = decoders("llama")
    asked = [[random.Random(i).randint(2, 380) for _ in range(1 + 4 * i)] for i in range(4)]
    settings = {"chunk": 20, "preempt": 0.05, "max_num_seqs": 6, "ahead": 1}
    runner, capture = graphed(decoder, max_num_tokens=16)
    with_graphs = answer_all(runner, [make_asked(p, 4) for p in asked], random.Random(1), **settings)
    plain = make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=DEVICE)
    without = answer_all(plain, [make_asked(p, 4) for p in asked], random.Random(1), **settings)
    assert capture.replayed >= 3
    same = sum(a.tokens == b.tokens for a, b in zip(with_graphs, without, strict=True))
    assert same >= len(asked) - 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-window", "gpt-oss"])
def test_an_exact_step_from_a_graph_has_the_bits_of_an_eager_one(decoders, name, monkeypatch):
    """The second step has fewer rows, so the third finds an older one's numbers in the buffers."""
    monkeypatch.setattr(graphs, "FEWEST_EXACT_ROWS", 3)
    decoder, rng = decoders(name), random.Random(name)
    groups = decoder.num_groups
    prompts, decodes = admitted(rng, [rng.randint(1, 20) for _ in range(4)], groups)
    plans = [prompts] + [
        make_plan(2 + i, rows, num_groups=groups, exact=True)
        for i, rows in enumerate((decodes, decodes[:2], decodes[::-1][:3]))
    ]
    runner, capture = graphed(decoder)
    replayed = logits_of(runner, plans)
    eager = logits_of(make_runner(decoder, max_num_seqs=6, copies=LateCopies(), device=DEVICE), plans)
    assert capture.replayed == 3
    for mine, theirs in zip(replayed, eager, strict=True):
        assert torch.equal(mine, theirs)


def test_a_runner_whose_every_step_is_exact_has_graphs_of_such_steps_only(decoders):
    decoder = decoders("llama")
    runner, capture = graphed(decoder, max_num_tokens=16, deterministic=True)
    prompts, decodes = admitted(random.Random(1), [3, 5])
    runner.run(prompts)
    runner.run(make_plan(2, decodes))
    assert (capture.captured, capture.replayed) == (len(exact_buckets_upto(6)), 1)


@pytest.mark.parametrize(
    "plan",
    [
        make_plan(2, [(5, 1, False, ())], exact=True),
        make_plan(2, [(5, 1, False, ())]),
        make_plan(2, [(5, 1, True, ()), (0, 2, True, (9,))], [make_admit(0, [4, 5])]),
    ],
    ids=["an exact chunk", "a chunk of one", "beside a prompt"],
)
def test_steps_that_are_more_than_decoding_run_eagerly(decoders, plan):
    decoder = decoders("llama")
    runner, capture = graphed(decoder)
    runner.run(make_plan(1, [(5, 2, True, (0,))], [make_admit(5, [4, 5])]))
    if not plan.samples[0]:
        runner.run(make_plan(2, (), [make_admit(5, [4, 5, 6], computed=1, blocks=[0])]))
    runner.run(plan)
    assert capture.replayed == 0


def test_contexts_beyond_the_room_for_attentions_work_run_eagerly(decoders, monkeypatch):
    monkeypatch.setattr(attention, "LEAST_SPLIT", 64)
    monkeypatch.setattr(attention, "MOST_SPLIT", 64)
    decoder = decoders("llama")
    spec = decoder.spec
    monkeypatch.setattr(graphs, "MAX_PARTIAL_BYTES", 4 * 4 * spec.num_heads * (spec.head_dim + 2))
    held, _ = graphed(decoder)
    inputs = [torch.tensor([[3, 3], [9, 9], [1, 9], contexts, [0, 1]]).numpy() for contexts in ([64, 192], [256, 256])]
    assert [held._graphs.take(each, exact=False) is not None for each in inputs] == [True, False]


def test_the_rehearsal_before_the_pool_is_made_goes_through_the_largest_graph(decoders):
    decoder, peaks = decoders("llama"), []

    class Gauge:
        def peak_of(self, function):
            function()
            peaks.append(function)
            return 1

    config = WorkerConfig(max_num_seqs=3, max_num_batched_tokens=9, block_size=8)
    runner = make_runner(decoder, num_blocks=1, max_num_seqs=3, max_model_len=16, copies=LateCopies(), device=DEVICE)
    steps = measure_steps(config, decoder, runner, Gauge(), max_model_len=16, with_graphs=True)
    assert len(peaks) == 2
    assert steps.graphs > steps.eager == 1
    assert runner._graphs._numbers[3, :3].tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decode_step_takes_nine_kernels_a_layer(decoders, name, monkeypatch):
    """Norm, QKV, rope with the write of K and V, attention and the merge of its splits, O with its sum, norm, gate and
    up with SiLU, down with its sum; and once a step the count of splits, the last norm and the head."""
    decoder, started, start = decoders(name), [], launch._start
    held, _ = graphed(decoder)
    monkeypatch.setattr(launch, "_start", lambda kernel, *rest: started.append(kernel.__name__) or start(kernel, *rest))
    held._graphs.take(torch.tensor([[3, 3], [9, 9], [1, 9], [64, 120], [0, 1]]).numpy(), exact=False)
    assert len(started) == 9 * decoder.spec.num_layers + 3, started


def test_a_prompt_fits_into_a_graph_where_many_heads_leave_a_tile_few_queries(decoders, monkeypatch):
    """As those of StarCoder and Falcon, all of whose heads share one KV head."""
    monkeypatch.setattr(attention, "PROMPT", attention.PROMPT._replace(rows=16))
    decoder = decoders("llama")
    held, _ = graphed(decoder, max_num_tokens=16)
    tiles = attention.mixed_tiles(held._pages, [767], [767], decoder.spec.num_heads)
    assert 64 < len(tiles) <= held._mixed_graphs._num_tiles(768)


def living_graphs():
    return [each for each in gc.get_objects() if type(each) in (graphs.Graphs, mixed_graphs.MixedGraphs)]


def test_the_rehearsal_goes_through_every_graph_and_leaves_none_when_the_rest_is_measured(decoders, monkeypatch):
    decoder, tokens, alive = decoders("llama"), [], []
    compute_mixed = decoder.compute_mixed

    def noted(rows, *rest):
        tokens.append(len(rows.token_ids))
        compute_mixed(rows, *rest)

    class Gauge:
        def peak_of(self, function):
            function()
            return 1

        def memory(self):
            alive.append(len(living_graphs()))
            return Memory(free=2**30, total=2**30)

    monkeypatch.setattr(decoder, "compute_mixed", noted)
    monkeypatch.setattr(load, "uses_graphs", lambda *_: True)
    monkeypatch.setattr(load, "Runner", lambda *args, **named: Runner(*args, **{**named, "copies": LateCopies()}))
    config = WorkerConfig(max_num_seqs=3, max_num_batched_tokens=40, max_model_len=64, block_size=8)
    layout = layout_of(decoder.spec, decoder.dtype, 8)
    gc.collect()
    before = len(living_graphs())
    gc.disable()
    try:
        load.measure_room(config, decoder, layout, Gauge())
    finally:
        gc.enable()
    assert tokens == [32, 16]
    assert alive == [before]


def test_buckets_are_fine_where_batches_are_small_and_end_with_the_largest():
    assert buckets_upto(1) == [1]
    assert buckets_upto(6) == [1, 2, 4, 6]
    assert buckets_upto(32) == [1, 2, 4, 8, 16, 24, 32]
    assert buckets_upto(400)[-4:] == [248, 256, 320, 384, 400][-4:]
    assert len(buckets_upto(1024)) < 50
    assert exact_buckets_upto(6) == [6]
    assert exact_buckets_upto(200) == [16, 64, 128, 192, 200]


def test_a_plan_on_the_device_refuses_what_would_not_fit():
    pool = torch.zeros(4, 1, 2, 1, 8, 16)
    contexts, tables, slots = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2)
    for wrong in (
        (contexts, tables, slots),
        (contexts.long(), tables, slots.long()),
        (contexts, tables[:1], slots.long()),
        (contexts, tables.t().contiguous().t(), slots.long()),
    ):
        with pytest.raises(ValueError):
            attention.plan_decode(pool, *wrong, num_heads=2, max_splits=4)
