"""From a configuration to a runner: device, dtype, weights, pool. Runs on a thread, before the worker registers."""

import functools
import gc
import importlib.util
import os
from pathlib import Path

import msgspec
import numpy as np
import psutil
import structlog
import torch
from llguidance import LLTokenizer

from kernels.ops import choice, forms
from kernels.ops.attention import most_decode_rows
from services.worker.execute.runner import Runner
from services.worker.execute.slots import Slots
from services.worker.host import Loaded, Progress
from services.worker.memory.budget import CudaGauge, Gauge, pool_bytes, refuse_allocator
from services.worker.memory.copies import CudaCopies
from services.worker.memory.layout import BlockLayout, layout_of
from services.worker.memory.pool import PoolTooSmall, allocate_pool, count_blocks
from services.worker.models.costs import costs_of
from services.worker.models.decoder import Decoder, load_decoder, random_decoder
from services.worker.models.registry import translate
from services.worker.models.size import sizes_of
from services.worker.models.spec import ModelSpec
from services.worker.plan import Admit, StepPlan
from services.worker.rehearsal import measure_steps
from services.worker.sampling.guide import Masks
from services.worker.sampling.sampler import Sampler
from services.worker.warm import capture_graphs, compile_kernels, uses_graphs
from services.worker.work import StepCosts
from shared.cache_groups import held_blocks, longest_context
from shared.checkpoint import Checkpoint, open_checkpoint
from shared.config import WorkerConfig
from shared.sampling import Sampling
from shared.text.grammar import load_vocabulary
from shared.text.tokenizer import end_token_ids, load_tokenizer

log = structlog.get_logger("load")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAST_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As /proc/cpuinfo spells what makes bfloat16 faster than float32 (x86 and ARM)."""
CGROUP = Path("/sys/fs/cgroup")
WARM_UP_TOKENS = 32
SECOND_COPY_SHARE = 0.15
"""Of the free memory: a second copy of the weights may take so much, and is left out where it would need more."""
MOST_MASK_THREADS = 8
"""For the masks of grammars; no more than half of the cores."""
GIB = 2**30


class WorkerError(Exception):
    """A setting that this machine or this model cannot follow; the message says what to do."""


class PoolSize(msgspec.Struct, frozen=True):
    """How many blocks, and the longest context that they and the model allow."""

    num_blocks: int
    max_model_len: int


class Room(msgspec.Struct, frozen=True):
    """Bytes that a GPU has for the pool beside the largest step: as much as this worker may take, and all there is."""

    allowed: int
    free: int


def load(config: WorkerConfig, progress: Progress) -> Loaded:
    """Raises WorkerError, CheckpointError or PoolTooSmall, each with a message for a person."""
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or count_cores())
    drawn = config.load_format == "dummy"
    checkpoint = open_checkpoint(config.model, revision=config.revision or None, progress=progress, weights=not drawn)
    spec = translate(checkpoint.config).spec
    flags = cpu_flags() if device == "cpu" else frozenset[str]()
    if device == "cuda" and (refusal := refuse_allocator(os.environ) or refuse_rows(config.max_num_seqs)):
        raise WorkerError(refusal)
    dtype = DTYPES[choose_dtype(config.dtype, checkpoint.dtype, flags, device)]
    num_parameters = sizes_of(spec).total
    _require_room(num_parameters, dtype, free_on(device))
    layout = layout_of(spec, dtype, config.block_size)
    twice = device == "cpu" and has_room_twice(config, num_parameters, layout, free_on(device))
    if drawn:
        log.warning("weights_are_random", because="--load-format dummy", effect="answers mean nothing")
        decoder = random_decoder(checkpoint.config, dtype, device=device, max_model_len=config.max_model_len)
    else:
        decoder = load_decoder(checkpoint, dtype, device, progress, by_rows=twice, max_model_len=config.max_model_len)
    _log_kernels(device, dtype, twice)
    _log_stretch(decoder.spec)
    weight_bytes = num_parameters * dtype.itemsize
    progress(weight_bytes, weight_bytes)  # files also hold headers: without this the last report would fall short
    prepare = _prepare_on_cpu if device == "cpu" else _prepare_on_gpu
    runner, size = prepare(config, decoder, layout)
    return _describe(config, checkpoint, runner, layout, size, device, costs_of(spec, dtype.itemsize))


def _prepare_on_cpu(config: WorkerConfig, decoder: Decoder, layout: BlockLayout) -> tuple[Runner, PoolSize]:
    size = size_pool(config, layout, decoder.spec.max_positions, free_bytes())
    runner = build_runner(config, decoder, layout, size)
    _warm_up(runner, layout, size)
    return runner, size


def _prepare_on_gpu(config: WorkerConfig, decoder: Decoder, layout: BlockLayout) -> tuple[Runner, PoolSize]:
    """Kernels are compiled, then a worst step is measured, then the pool takes what is left, then graphs are captured
    on it. What is compiled behind that is counted as late."""
    gauge, spec = CudaGauge(), decoder.spec
    compile_kernels(decoder, layout, config.max_model_len or spec.max_positions)
    room = measure_room(config, decoder, layout, gauge)
    size = size_pool(config, layout, spec.max_positions, room.free, room=room.allowed)
    runner = build_runner(config, decoder, layout, size, "cuda")
    if uses_graphs(config, "cuda"):
        capture_graphs(runner, decoder, config.max_num_batched_tokens)
    _warm_up(runner, layout, size)
    forms.seal()
    return runner, size


def measure_room(config: WorkerConfig, decoder: Decoder, layout: BlockLayout, gauge: Gauge) -> Room:
    """What the weights and a worst step leave. Raises WorkerError where that holds no block and no size was told."""
    longest = config.max_model_len or decoder.spec.max_positions
    device = decoder.device.type
    rehearsing = build_runner(config, decoder, layout, PoolSize(1, longest), device)
    with_graphs = uses_graphs(config, device)
    steps = measure_steps(config, decoder, rehearsing, gauge, max_model_len=longest, with_graphs=with_graphs)
    del rehearsing
    gc.collect()  # graphs and the functions that they call hold one another, and their buffers
    memory = gauge.memory()
    room = pool_bytes(memory, config.gpu_memory_utilization, steps.total)
    gib = {name: round(getattr(steps, name) / GIB, 2) for name in ("eager", "graphs")}
    log.info(
        "memory_measured", **gib, held_gib=round((memory.total - memory.free) / GIB, 2), room_gib=round(room / GIB, 2)
    )
    told = config.num_gpu_blocks_override or config.kv_cache_memory_bytes
    if room < layout.bytes_per_block and not told:
        raise WorkerError(
            f"--gpu-memory-utilization {config.gpu_memory_utilization} allows "
            f"{memory.total * config.gpu_memory_utilization / GIB:.1f} GiB of this GPU; "
            f"{(memory.total - memory.free) / GIB:.1f} GiB are held already (weights among them) and a step may take "
            f"{steps.total / GIB:.1f} GiB more, so no KV block fits: raise it, end other programs, or lower "
            "--max-num-batched-tokens or --max-num-seqs"
        )
    return Room(room, memory.free - steps.total)


def _describe(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    runner: Runner,
    layout: BlockLayout,
    size: PoolSize,
    device: str,
    costs: StepCosts,
) -> Loaded:
    return Loaded(
        runner=runner,
        costs=costs,
        model_fingerprint=checkpoint.fingerprint,
        dtype=str(layout.dtype).removeprefix("torch."),
        device=device,
        block_size=layout.block_size,
        num_blocks=size.num_blocks,
        block_bytes=layout.bytes_per_block,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=size.max_model_len,
        vocab_size=runner.vocab_size,
        windows=layout.windows,
        table_verdicts=forms.table_verdicts() if device == "cuda" else {},
        load_vocabulary=functools.partial(_load_vocabulary, checkpoint, runner.vocab_size),
    )


def _load_vocabulary(checkpoint: Checkpoint, vocab_size: int) -> LLTokenizer:
    """Raises TokenizerError, or ValueError where the logits are fewer than the tokens."""
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = end_token_ids(checkpoint.generation_config, checkpoint.config, tokenizer)
    return load_vocabulary(tokenizer.to_json(), vocab_size, ends)


def choose_device(asked: str) -> str:
    """`auto` is a GPU where torch sees one and triton is installed. Raises WorkerError."""
    has_triton = importlib.util.find_spec("triton") is not None
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() and has_triton else "cpu"
        if torch.cuda.is_available() and not has_triton:
            log.warning("gpu_left_aside", because="triton is not installed: sh ops/scripts/setup installs it")
    if asked == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise WorkerError(
            f"--device cuda: torch {torch.__version__} sees no NVIDIA GPU here; see `nvidia-smi`, install the ordinary "
            "build of torch (sh ops/scripts/setup does on a GPU machine), or leave out --device"
        )
    if not has_triton:
        raise WorkerError("--device cuda needs triton: sh ops/scripts/setup installs it on a machine with a GPU")
    return "cuda"


def choose_dtype(asked: str, kept_in: str, flags: frozenset[str], device: str = "cpu") -> str:
    """`auto` takes a bfloat16 checkpoint as it is where the CPU multiplies bfloat16 fast, and float32 elsewhere; on a
    GPU it takes a 16-bit checkpoint as it is, and bfloat16 otherwise.

    `kept_in` is the checkpoint's dtype. Raises WorkerError.
    """
    if device == "cuda":
        return asked if asked != "auto" else "float16" if kept_in == "float16" else "bfloat16"
    if asked == "float16":
        raise WorkerError("float16 is not offered on a CPU: use --dtype bfloat16 or float32")
    if asked != "auto":
        return asked
    return "bfloat16" if kept_in == "bfloat16" and flags & FAST_BFLOAT16_FLAGS else "float32"


def refuse_rows(max_num_seqs: int) -> str:
    """Why a GPU's kernels cannot compute a step of so many sequences, or nothing."""
    most = most_decode_rows()
    if max_num_seqs <= most:
        return ""
    return f"--max-num-seqs {max_num_seqs}: on a GPU {most} sequences run at once at most"


def free_on(device: str) -> int:
    """Bytes that this process may still take on the device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else free_bytes()


def cpu_flags() -> frozenset[str]:
    """The features of this CPU as Linux names them; empty where it cannot say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(named.partition(":")[2].split())


def count_cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def free_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    available = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return available
    return max(0, min(available, limit - used + int(stat.get("inactive_file", 0))))


def _require_room(num_parameters: int, dtype: torch.dtype, free: int) -> None:
    needed = num_parameters * dtype.itemsize
    if needed > free:
        raise WorkerError(
            f"the weights need {needed / GIB:.1f} GiB as {str(dtype).removeprefix('torch.')}, {free / GIB:.1f} GiB are "
            "free: end other programs, or take a smaller model"
        )


def has_room_twice(config: WorkerConfig, num_parameters: int, layout: BlockLayout, free: int) -> bool:
    """Whether a second copy of the weights, for steps of few rows, takes little enough of what is free beside the first
    one and a pool of a size that was asked for."""
    asked = config.num_gpu_blocks_override * layout.bytes_per_block or config.kv_cache_memory_bytes
    weights = num_parameters * layout.dtype.itemsize
    return weights <= (free - weights - asked) * SECOND_COPY_SHARE


def _log_kernels(device: str, dtype: torch.dtype, twice: bool) -> None:
    """Which bodies compute, once: a slower one should not have to be guessed."""
    if device != "cpu" or dtype != torch.bfloat16:
        return
    why_not = choice.why_not_compiled()
    if why_not:
        log.warning("kernels", bodies="torch", instead_of="compiled", reason=why_not)
    else:
        log.info("kernels", bodies="compiled", weights_by_rows=twice)


def _log_stretch(spec: ModelSpec) -> None:
    """A longer context than is served can be had, at a price: an operator should hear of it once."""
    if spec.stretched_positions:
        log.info(
            "context_limited",
            by="longrope, whose factors for longer ones change all answers",
            max_positions=spec.max_positions,
            do=f"--max-model-len of up to {spec.stretched_positions} serves with those",
        )


def size_pool(
    config: WorkerConfig, layout: BlockLayout, max_positions: int, free: int, *, room: int | None = None
) -> PoolSize:
    """Blocks as told, else as many as the bytes of `room` hold, measured on a GPU. On a CPU (None) for `max_num_seqs`
    whole contexts, else what half of this worker's share (`gpu_memory_utilization`) of the free memory holds.

    Raises WorkerError where what was asked for does not fit, PoolTooSmall where not one block of each cache group does.
    """
    if config.max_model_len > max_positions:
        raise WorkerError(f"--max-model-len {config.max_model_len}: the model ends at {max_positions} positions")
    longest = config.max_model_len or max_positions
    held_by = layout.windows, layout.block_size, config.max_num_batched_tokens
    if config.num_gpu_blocks_override:
        num_blocks = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes:
        num_blocks = count_blocks(layout, memory_bytes=config.kv_cache_memory_bytes)
    elif room is not None:
        num_blocks = count_blocks(layout, memory_bytes=room)
    else:
        enough = config.max_num_seqs * held_blocks(longest, *held_by)
        num_blocks = min(enough, count_blocks(layout, available_bytes=int(free * config.gpu_memory_utilization)))
    needed = num_blocks * layout.bytes_per_block
    if needed > free:
        raise WorkerError(
            f"{num_blocks} KV blocks need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: "
            "ask for less with --kv-cache-memory-bytes or --num-gpu-blocks-override"
        )
    room = longest_context(num_blocks, *held_by)
    if room < 1:
        raise PoolTooSmall(
            f"{num_blocks} KV blocks do not give one to each of {len(layout.windows)} cache groups: ask for more with "
            "--kv-cache-memory-bytes or --num-gpu-blocks-override"
        )
    if config.max_model_len > room:
        raise WorkerError(
            f"--max-model-len {config.max_model_len} does not fit into {num_blocks} KV blocks of {layout.block_size} "
            f"tokens: the longest that does is {room}"
        )
    if longest > room:
        log.info("context_limited", by="the KV pool", max_model_len=room, max_positions=longest)
    return PoolSize(num_blocks, min(longest, room))


def build_runner(
    config: WorkerConfig, decoder: Decoder, layout: BlockLayout, size: PoolSize, device: str = "cpu"
) -> Runner:
    """The runner, its slots and its pool."""
    pool = allocate_pool(layout, size.num_blocks, device)
    vocab_size = decoder.spec.vocab_size
    slots = Slots(
        max_num_seqs=config.max_num_seqs,
        max_model_len=size.max_model_len,
        block_size=layout.block_size,
        num_pool_blocks=size.num_blocks,
        vocab_size=vocab_size,
        windows=layout.windows,
    )
    masks = Masks(vocab_size, num_threads=max(1, min(count_cores() // 2, MOST_MASK_THREADS)))
    sampler = Sampler(max_num_seqs=config.max_num_seqs, vocab_size=vocab_size, masks=masks)
    copies = CudaCopies(torch.device(device)) if device == "cuda" else None
    exact = config.deterministic or decoder.dtype == torch.float32  # float32 is exact by itself
    return Runner(decoder, pool.pages, slots, sampler, deterministic=exact, copies=copies)


def _warm_up(runner: Runner, layout: BlockLayout, size: PoolSize) -> None:
    """A prompt and a token, so that the first request does not wait for what is prepared once. Leaves no slot."""
    num_tokens = min(WARM_UP_TOKENS, size.max_model_len - 1)
    if num_tokens < 1:
        return
    greedy = Sampling(seed=0, temperature=0.0)
    admit = Admit(slot=0, token_ids=np.zeros(num_tokens, np.int32), prompt_len=num_tokens, sampling=greedy)
    blocks = np.arange(layout.blocks_for(num_tokens + 1), dtype=np.int32) % size.num_blocks
    num_groups = len(layout.windows)
    for count, further, admits in ((num_tokens, blocks, (admit,)), (1, blocks[:0], ())):
        plan = StepPlan(
            step=0,
            slots=np.zeros(1, np.int64),
            counts=np.array([count]),
            block_counts=np.full(num_groups, len(further)),
            samples=np.ones(1, np.bool_),
            blocks=np.tile(further, num_groups),
            admits=admits,
        )
        runner.run(plan)
    runner.reset()
