import asyncio
import math
import os
import signal

import msgspec
import pytest
import structlog
import torch

from services.worker.app import serve
from services.worker.environment import SPIN_COUNT, worker_environment
from services.worker.load import (
    SECOND_COPY_SHARE,
    WorkerError,
    choose_device,
    choose_dtype,
    count_cores,
    free_bytes,
    has_room_twice,
    load,
    size_pool,
)
from services.worker.memory.layout import BlockLayout
from services.worker.memory.pool import PoolTooSmall
from services.worker.warm import uses_graphs
from shared.checkpoint import BUNDLED_FOLDER, CheckpointError, open_checkpoint
from shared.config import WorkerConfig
from shared.net.channel import open_internal_channel
from shared.rpc.sluice.v1 import execution_pb2 as pb
from shared.rpc.sluice.v1.execution_pb2_grpc import ExecutionStub
from tests.builders.plans import make_admit, make_plan, plan_message
from tests.builders.registry import FakeRegistry, serve_registry
from tests.builders.runners import answer_alone, make_asked
from tests.models.twins import make_twin

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, block_size=16, head_dim=8, dtype=torch.float32)  # 2,048 B a block
BIG = 2**40


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return make_twin("llama", tmp_path_factory.mktemp("twins"))


@pytest.fixture(autouse=True)
def restored():
    """Serving configures the process: its threads and its logs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    structlog.reset_defaults()


def small_config(model, **fields):
    fields = {"threads": 1, "num_gpu_blocks_override": 32, "port": 0, "metrics_port": 0} | fields
    return WorkerConfig(model=str(model), **fields)


@pytest.mark.parametrize(
    ("asked", "kept_in", "flags", "dtype"),
    [
        ("auto", "bfloat16", {"avx512_bf16"}, "bfloat16"),
        ("auto", "bfloat16", {"amx_bf16"}, "bfloat16"),
        ("auto", "bfloat16", {"avx512f"}, "float32"),
        ("auto", "float32", {"avx512_bf16"}, "float32"),
        ("auto", "float16", {"avx512_bf16"}, "float32"),
        ("bfloat16", "float32", set(), "bfloat16"),
        ("float32", "bfloat16", {"avx512_bf16"}, "float32"),
    ],
)
def test_the_dtype_follows_the_checkpoint_where_the_cpu_is_fast_at_it(asked, kept_in, flags, dtype):
    assert choose_dtype(asked, kept_in, frozenset(flags)) == dtype


def test_what_a_cpu_cannot_do_is_refused_by_name():
    with pytest.raises(WorkerError, match="--dtype bfloat16 or float32"):
        choose_dtype("float16", "float16", frozenset())
    with pytest.raises(WorkerError, match=r"sees no NVIDIA GPU.*leave out --device"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == "cpu"


def test_on_a_gpu_a_16_bit_checkpoint_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_device("cuda") == choose_device("auto") == "cuda"
    assert choose_device("cpu") == "cpu"
    kept = {
        kept_in: choose_dtype("auto", kept_in, frozenset(), "cuda") for kept_in in ("float16", "bfloat16", "float32")
    }
    assert kept == {"float16": "float16", "bfloat16": "bfloat16", "float32": "bfloat16"}
    assert choose_dtype("float32", "float16", frozenset(), "cuda") == "float32"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkerError, match="needs triton"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"
    assert 1 <= count_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("fields", "device", "expected"),
    [
        ({}, "cuda", True),
        ({"deterministic": True}, "cuda", True),
        ({"enforce_eager": True}, "cuda", False),
        ({}, "cpu", False),
    ],
)
def test_graphs_are_for_gpus_unless_they_are_turned_off(fields, device, expected):
    assert uses_graphs(WorkerConfig(**fields), device) is expected


def test_a_pool_holds_every_slots_whole_context_and_no_more_where_memory_allows():
    config = WorkerConfig(max_num_seqs=3)
    size = size_pool(config, LAYOUT, 100, BIG)
    assert (size.num_blocks, size.max_model_len) == (3 * 7, 100)


@pytest.mark.parametrize("share, num_blocks", [(1.0, 10), (0.5, 5)])
def test_a_pool_takes_half_of_its_share_of_the_free_memory_at_most_and_the_context_shrinks_with_it(share, num_blocks):
    config = WorkerConfig(max_num_seqs=64, gpu_memory_utilization=share)
    size = size_pool(config, LAYOUT, 1000, 20 * 2048)
    assert (size.num_blocks, size.max_model_len) == (num_blocks, 16 * num_blocks)


def test_weights_are_kept_twice_only_beside_all_that_was_asked_for():
    weights = 1000 * LAYOUT.dtype.itemsize
    enough = weights + math.ceil(weights / SECOND_COPY_SHARE)
    told = WorkerConfig(num_gpu_blocks_override=3)
    pool = 3 * LAYOUT.bytes_per_block
    assert has_room_twice(WorkerConfig(), 1000, LAYOUT, enough)
    assert not has_room_twice(WorkerConfig(), 1000, LAYOUT, enough - 1)
    assert has_room_twice(told, 1000, LAYOUT, enough + pool)
    assert not has_room_twice(told, 1000, LAYOUT, enough + pool - 1)
    assert not has_room_twice(WorkerConfig(kv_cache_memory_bytes=pool), 1000, LAYOUT, enough + pool - 1)


def test_windows_make_room_for_contexts_beyond_the_pool():
    """A window of 64 and a chunk of 32 touch 7 blocks of 16."""
    windowed = msgspec.structs.replace(LAYOUT, windows=(64,))
    both = msgspec.structs.replace(LAYOUT, windows=(None, 64))
    config = WorkerConfig(max_num_batched_tokens=32, max_num_seqs=3)
    seven = msgspec.structs.replace(config, num_gpu_blocks_override=7)
    assert size_pool(config, windowed, 1000, BIG).num_blocks == 3 * 7
    assert size_pool(config, both, 1000, BIG).num_blocks == 3 * (7 + 63)
    assert size_pool(seven, windowed, 1000, BIG).max_model_len == 1000
    assert size_pool(seven, LAYOUT, 1000, BIG).max_model_len == 7 * 16
    assert size_pool(seven, both, 1000, BIG).max_model_len == 3 * 16
    with pytest.raises(PoolTooSmall, match="each of 2 cache groups"):
        size_pool(WorkerConfig(num_gpu_blocks_override=1), both, 1000, BIG)


def test_told_sizes_are_taken_as_they_are():
    assert size_pool(WorkerConfig(num_gpu_blocks_override=7), LAYOUT, 50, BIG).num_blocks == 7
    assert size_pool(WorkerConfig(kv_cache_memory_bytes=5 * 2048 + 100), LAYOUT, 50, BIG).num_blocks == 5
    assert size_pool(WorkerConfig(max_model_len=40), LAYOUT, 50, BIG).max_model_len == 40


@pytest.mark.parametrize(
    ("error", "words", "fields", "free"),
    [
        (WorkerError, "the model ends at 50 positions", {"max_model_len": 51}, BIG),
        (WorkerError, "the longest that does is 32", {"max_model_len": 50, "num_gpu_blocks_override": 2}, BIG),
        (WorkerError, "--num-gpu-blocks-override", {"num_gpu_blocks_override": 10}, 9 * 2048),
        (WorkerError, "--kv-cache-memory-bytes", {"kv_cache_memory_bytes": 10 * 2048}, 9 * 2048),
        (PoolTooSmall, "--kv-cache-memory-bytes", {"kv_cache_memory_bytes": 100}, BIG),
        (PoolTooSmall, "block", {}, 1000),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(error, words, fields, free):
    with pytest.raises(error, match=words):
        size_pool(WorkerConfig(**fields), LAYOUT, 50, free)


def test_free_memory_is_the_containers_where_that_is_less(tmp_path):
    alone = free_bytes(tmp_path / "no-such-group")
    assert alone > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert free_bytes(tmp_path) == 1300
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(tmp_path) > 2**20


def test_a_loaded_checkpoint_states_its_facts_and_answers(twin):
    seen = []
    loaded = load(small_config(twin, max_num_seqs=2, dtype="float32"), lambda done, total: seen.append((done, total)))
    assert (loaded.dtype, loaded.device, loaded.num_blocks, loaded.block_size) == ("float32", "cpu", 32, 16)
    assert (loaded.max_num_seqs, loaded.max_model_len, loaded.vocab_size) == (2, 512, 384)
    assert loaded.model_fingerprint == open_checkpoint(twin).fingerprint
    assert loaded.block_bytes == 2 * 3 * 2 * 16 * 16 * 4
    assert seen[-1][0] == seen[-1][1] > 0
    assert len(answer_alone(loaded.runner, make_asked([4, 5, 6], 3)).tokens) == 3


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_read(twin, monkeypatch):
    monkeypatch.setattr("services.worker.load.free_bytes", lambda: 1000)
    with pytest.raises(WorkerError, match="the weights need"):
        load(small_config(twin), lambda done, total: None)


def test_a_model_that_is_not_there_is_refused_by_name():
    with pytest.raises(CheckpointError, match="/no/such/folder"):
        load(small_config("/no/such/folder"), lambda done, total: None)


def test_a_served_worker_answers_over_grpc(twin):
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry:
            ready = asyncio.get_running_loop().create_future()

            def on_event(name, facts):
                if name == "ready":
                    ready.set_result(facts["address"])

            serving = asyncio.create_task(serve(small_config(twin, scheduler=registry.address), on_event=on_event))
            async with open_internal_channel(await asyncio.wait_for(ready, 30)) as channel:
                call = ExecutionStub(channel).Execute()
                await call.write(pb.ExecuteRequest(begin=pb.ExecuteBegin(epoch=1)))
                assert (await call.read()).ready.epoch == 1
                await call.write(plan_message(make_plan(1, [(0, 3, True, (9,))], [make_admit(0, [4, 5, 6])])))
                result = (await call.read()).result
                assert (result.error, len(result.tokens)) == ("", 4)
                os.kill(os.getpid(), signal.SIGTERM)
                assert await asyncio.wait_for(serving, 10) == 0

    asyncio.run(scenario())


def test_a_refused_worker_returns_1_and_says_why(twin, capsys):
    async def scenario():
        events = []
        async with serve_registry(FakeRegistry(refusal="the worker's dtype is float32")) as registry:
            config = small_config(twin, scheduler=registry.address)
            assert await serve(config, on_event=lambda name, facts: events.append(name)) == 1
        assert events[-1] == "refused"

    asyncio.run(scenario())
    assert "the worker's dtype is float32" in capsys.readouterr().err


def test_the_bundled_model_is_where_the_worker_looks_for_it():
    assert (BUNDLED_FOLDER / "config.json").is_file()


def test_a_workers_environment_keeps_what_the_user_has_set():
    assert worker_environment({})["GOMP_SPINCOUNT"] == SPIN_COUNT
    assert "GOMP_SPINCOUNT" not in worker_environment({"OMP_WAIT_POLICY": "ACTIVE"})
    whole = worker_environment({})
    assert worker_environment(whole) == {}


def test_random_weights_need_no_weight_file_and_are_the_same_each_time(twin, tmp_path):
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (twin / name).is_file():
            (tmp_path / name).write_bytes((twin / name).read_bytes())
    with pytest.raises(CheckpointError, match="its weights are missing"):
        load(small_config(tmp_path), lambda done, total: None)
    first, second = (load(small_config(tmp_path, load_format="dummy"), lambda done, total: None) for _ in range(2))
    assert first.model_fingerprint == ""
    assert answer_alone(first.runner, make_asked([5, 6, 7], 4)) == answer_alone(second.runner, make_asked([5, 6, 7], 4))
