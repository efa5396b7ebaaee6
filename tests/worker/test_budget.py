import pytest
import torch

from services.worker.load import PoolSize as Size
from services.worker.load import WorkerError, build_runner, measure_room, refuse_rows, size_pool
from services.worker.memory.budget import GRAPH_BYTES, Memory, pool_bytes, refuse_allocator
from services.worker.memory.layout import layout_of
from services.worker.models.decoder import load_decoder
from services.worker.rehearsal import measure_steps
from shared.checkpoint import open_checkpoint
from shared.config import WorkerConfig
from tests.models.twins import make_twin

GIB = 2**30


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    path = make_twin("llama", tmp_path_factory.mktemp("twins"))
    return load_decoder(open_checkpoint(str(path)), torch.float32)


class FakeGauge:
    """Says what a test wants, and runs what is to be measured."""

    def __init__(self, *, peak=2 * GIB):
        self._memory, self._peak = Memory(free=60 * GIB, total=80 * GIB), peak

    def memory(self):
        return self._memory

    def peak_of(self, function):
        function()
        return self._peak


def test_the_pool_takes_its_share_less_what_is_held_and_what_steps_need():
    memory = Memory(free=60 * GIB, total=80 * GIB)
    assert pool_bytes(memory, 0.9, 5 * GIB) == 72 * GIB - 20 * GIB - 5 * GIB
    assert pool_bytes(memory, 0.2, 5 * GIB) < 0


@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        ({}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:true"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, False),
    ],
)
def test_memory_that_no_other_process_can_open_is_refused_with_the_variable_that_asks_for_it(environ, refused):
    told = refuse_allocator(environ)
    assert bool(told) is refused
    assert not refused or next(iter(environ)) in told


def test_more_rows_than_the_kernels_of_a_gpu_take_are_refused_at_the_start():
    pytest.importorskip("triton")
    assert refuse_rows(1024) == ""
    assert refuse_rows(1025) == "--max-num-seqs 1025: on a GPU 1024 sequences run at once at most"


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len"), [(4, 64, 100), (8, 3, 100), (3, 10, 5), (1, 1, 2)]
)
def test_the_worst_step_fills_the_budget_in_as_many_rows_as_there_may_be(
    decoder, max_num_seqs, max_num_batched_tokens, max_model_len
):
    config = WorkerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len
    )
    layout = layout_of(decoder.spec, decoder.dtype, config.block_size)
    runner = build_runner(config, decoder, layout, Size(1, max_model_len))
    seen = []

    class Seeing:
        layers_done = 0
        logits = staticmethod(decoder.logits)

        def forward(self, batch, pool):
            return self.logits(self.hidden(batch, pool), exact=batch.exact)

        def hidden(self, batch, pool):
            seen.append((len(batch.token_ids), len(batch.context_lens), len(batch.logit_rows)))
            return decoder.hidden(batch, pool)

    runner._decoder = Seeing()
    steps = measure_steps(config, decoder, runner, FakeGauge(), max_model_len=max_model_len, with_graphs=False)
    rows = min(max_num_seqs, max_num_batched_tokens)
    num_tokens = min(max_num_batched_tokens, rows * (max_model_len - 1))
    assert seen == [(num_tokens, rows, num_tokens)]
    assert (steps.eager, steps.graphs) == (2 * GIB, 0)


@pytest.mark.parametrize(("exact", "num_graphs"), [(True, 1), (False, 6)])
def test_graphs_are_counted_beside_the_steps_that_no_graph_holds(exact, num_graphs, decoder, monkeypatch):
    """Of steps that are all exact one for up to 4 rows; else three more, and two of up to 16 and 32 tokens."""
    captured = []
    config = WorkerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    runner = build_runner(config, decoder, layout_of(decoder.spec, decoder.dtype, 16), Size(1, 64))
    monkeypatch.setattr(runner, "_deterministic", exact)
    monkeypatch.setattr(runner, "capture_graphs", lambda *arguments, **sizes: captured.append((*arguments, sizes)))
    steps = measure_steps(config, decoder, runner, FakeGauge(), max_model_len=64, with_graphs=True)
    assert len(captured) == 1
    assert steps.graphs == 2 * GIB + num_graphs * GRAPH_BYTES
    assert steps.total == 4 * GIB + num_graphs * GRAPH_BYTES


def test_a_gpus_pool_takes_all_the_room_that_was_measured(decoder):
    config = WorkerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64)
    layout = layout_of(decoder.spec, decoder.dtype, config.block_size)
    room = measure_room(config, decoder, layout, FakeGauge(peak=GIB))
    assert (room.allowed, room.free) == (72 * GIB - 20 * GIB - GIB, 60 * GIB - GIB)
    size = size_pool(config, layout, 512, room.free, room=room.allowed)
    assert size.num_blocks == room.allowed // layout.bytes_per_block
    assert size_pool(config, layout, 512, 60 * GIB, room=5 * layout.bytes_per_block).num_blocks == 5


def test_a_gpu_too_full_for_one_block_is_told_with_the_numbers_and_what_to_do(decoder):
    config = WorkerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, gpu_memory_utilization=0.25)
    layout = layout_of(decoder.spec, decoder.dtype, config.block_size)
    with pytest.raises(WorkerError, match=r"0.25 allows 20.0 GiB .* 20.0 GiB are held .* 2.0 GiB more.*--max-num-seqs"):
        measure_room(config, decoder, layout, FakeGauge())


def test_a_pool_of_a_size_that_was_told_may_take_more_than_the_share_but_not_what_steps_need(decoder):
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "gpu_memory_utilization": 0.25}
    layout = layout_of(decoder.spec, decoder.dtype, 16)

    def size_of(gib):
        config = WorkerConfig(kv_cache_memory_bytes=gib * GIB, **sizes)
        room = measure_room(config, decoder, layout, FakeGauge())
        return size_pool(config, layout, 512, room.free, room=room.allowed)

    assert size_of(58).num_blocks == 58 * GIB // layout.bytes_per_block
    with pytest.raises(WorkerError, match=r"need 59.0 GiB, 58.0 GiB are free"):
        size_of(59)
