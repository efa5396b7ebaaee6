"""`sluice doctor --model DIR`: what a checkpoint is and what serving it takes, from its config.json alone."""

from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.devices import GIB, Device, device_named
from shared.config import WorkerConfig

if TYPE_CHECKING:
    from services.worker.models.facts import ModelFacts

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
MEMORY_SHARE = {"datasheet": 0.9, "measured": 0.5}
"""Of a GPU's memory, `--gpu-memory-utilization` by default; of a CPU's free memory, so that others keep theirs."""


class DoctorError(Exception):
    """A command line that cannot be followed here; the message says what to do."""


def describe_model(
    model: str, *, context: int, dtype: str, device: str, block_size: int
) -> tuple["ModelFacts", Device]:
    """Raises CheckpointError, UnknownDevice or DoctorError, each with a message for a person."""
    from services.worker.models.facts import facts_of
    from services.worker.models.registry import translate
    from shared.checkpoint import read_config

    config = read_config(model)
    spec, dtype = translate(config).spec, _dtype(config, dtype)
    spec = spec.serving(context)
    context = context or spec.max_positions
    if not 0 < context <= spec.max_positions:
        raise DoctorError(f"--context {context}: the model ends at {spec.max_positions} positions")
    if block_size < 1:
        raise DoctorError(f"--block-size {block_size}: must be at least 1")
    found = device_named(device, dtype)
    facts = facts_of(
        spec,
        dtype=dtype,
        itemsize=ITEMSIZES[dtype],
        context=context,
        block_size=block_size,
        chunk=WorkerConfig().max_num_batched_tokens,
        memory_bytes=_usable_bytes(found),
        flops=found.flops[dtype],
        bytes_per_second=found.bytes_per_second,
    )
    return facts, found


def _usable_bytes(device: Device) -> int:
    """For weights and cache."""
    return int(device.memory_bytes * MEMORY_SHARE[device.how])


def _dtype(config: dict[str, Any], asked: str) -> str:
    """As asked, else as config.json states, else bfloat16."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = stated if asked == "auto" else asked
    if dtype not in ITEMSIZES:
        raise DoctorError(f"--dtype {dtype}: choose one of {', '.join(ITEMSIZES)}")
    return dtype


def print_model(facts: "ModelFacts", device: Device) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for subject, what in _lines(facts, device):
        table.add_row(f"[bold]{subject}[/]", escape(what))
    Console(highlight=False).print(table)


def _lines(facts: "ModelFacts", device: Device) -> list[tuple[str, str]]:
    sizes = facts.sizes
    parts = f"embedding {_count(sizes.embedding)}, attention {_count(sizes.attention)}"
    parts += f", feed-forward {_count(sizes.feed_forward)}, norms {_count(sizes.norms)}"
    active = f", {_count(facts.active_parameters)} of them used by a token" if sizes.idle_experts else ""
    at_context = facts.compute_bound_rows_at_context
    more = "never" if at_context is None else f"from {at_context:,.0f}"
    rates = f"{device.flops[facts.dtype] / 1e12:,.2f} TFLOP/s, {device.bytes_per_second / 1e9:,.0f} GB/s ({device.how})"
    return [
        ("architecture", f"{facts.architecture}, {facts.dtype}"),
        ("parameters", f"{_count(facts.total_parameters)}{active}: {parts}"),
        ("by 12·layers·d²", f"{_count(facts.rule_of_thumb)}, embeddings left out"),
        ("weights", _bytes(facts.weight_bytes)),
        ("cache of a token", f"{_bytes(facts.kv_bytes_per_token)}{_windows(facts)}"),
        ("device", f"{device.name}: {_bytes(device.memory_bytes)}, {rates}"),
        *_fitting(facts, device),
        ("B*", f"{facts.ratio:,.0f} operations for each byte"),
        (
            "compute-bound",
            f"from {facts.compute_bound_rows:,.0f} rows a step; where each has {facts.context:,} tokens, {more}",
        ),
    ]


def _fitting(facts: "ModelFacts", device: Device) -> list[tuple[str, str]]:
    usable = f"the {_bytes(_usable_bytes(device))} of {device.name} that weights and cache may take"
    if facts.weight_bytes > _usable_bytes(device):
        return [("does not fit", f"{_bytes(facts.weight_bytes)} of weights are more than {usable}")]
    if not facts.num_blocks:
        return [("does not fit", f"{_bytes(facts.weight_bytes)} of weights leave no room for a block in {usable}")]
    groups = f" in one of {facts.num_groups} groups of layers" if facts.num_groups > 1 else ""
    blocks = f"{facts.num_blocks:,} of {facts.block_size} tokens{groups}, {_bytes(facts.block_bytes)} each"
    requests = (
        f"{facts.requests:,} of {facts.context:,} tokens" if facts.requests else f"none of {facts.context:,} tokens"
    )
    return [("blocks that fit", blocks), ("requests that fit", requests)]


def _windows(facts: "ModelFacts") -> str:
    if [each.window for each in facts.windows] == [None]:
        return ""
    kinds = (
        f"{_bytes(each.bytes_per_token)} in {each.layers} layers that see "
        f"{'all positions' if each.window is None else f'{each.window:,}'}"
        for each in facts.windows
    )
    return ": " + ", ".join(kinds)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def as_json(facts: "ModelFacts", device: Device) -> str:
    return msgspec.json.encode({"model": facts, "device": device}).decode()
