"""`sluice tune`: measure which configuration multiplies each weight fastest on this GPU, and write the table."""

import contextlib
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.output import REFUSED, fail, user_message

if TYPE_CHECKING:
    from kernels.tuning.candidates import Config, Weight
    from kernels.tuning.table import Ceilings, Device, Row, Table
    from kernels.tuning.tuner import Tuner

SECONDS_PER_FORM = 1.0
SECONDS_PER_BUCKET = 0.5
"""For the estimate: compiling on one core, and measuring one weight at one number of rows."""
SHAPE = re.compile(r"(\w+):(\d+)x(\d+)")


class TuneError(Exception):
    """A command line that cannot be followed here; the message says what to do."""


def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A known model, a checkpoint's folder or a hub id; may be repeated. Default: all known."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="OP:OUTxIN", help="A weight by itself, as linear_add:4096x14336; may be repeated."),
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Of the weights.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="The GPU to measure on: cuda, or cuda:N.")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="The table to write or extend. Default: where workers look for it.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes that compile beforehand; 0: the cores, at most 12.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured, on any machine.")] = False,
) -> None:
    """Measure which configuration multiplies each weight fastest on this GPU, and write the table."""
    jobs = jobs or min(12, os.cpu_count() or 1)
    try:
        weights = _weights(model or [], shape or [], dtype)
        if dry_run:
            _list(weights, jobs, out)
        else:
            _measure(weights, device, jobs, out)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        fail(message)
        raise typer.Exit(REFUSED) from error


def _weights(models: Sequence[str], shapes: Sequence[str], dtype: str) -> list["Weight"]:
    """Each weight once. Raises TuneError, CheckpointError."""
    from kernels.tuning.models import MODELS

    if not models and not shapes:
        models = list(MODELS)
    found = [weight for name in models for weight in _weights_of(name, dtype)]
    found += [_parse(shape, dtype) for shape in shapes]
    return list(dict.fromkeys(found))


def _weights_of(model: str, dtype: str) -> tuple["Weight", ...]:
    from kernels.tuning.models import MODELS, weights_of

    if model in MODELS:
        return weights_of(**MODELS[model], dtype=dtype)
    from services.worker.models.registry import translate
    from services.worker.models.spec import Experts, Gated
    from shared.checkpoint import read_config

    spec = translate(read_config(model)).spec
    mlp = spec.feed_forward
    intermediate = mlp.shared_width if isinstance(mlp, Experts) else mlp.width
    fused = isinstance(mlp, Experts) or (isinstance(mlp, Gated) and mlp.activation == "silu")
    return weights_of(
        hidden=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate=intermediate,
        vocab_size=spec.vocab_size,
        dtype=dtype,
        up=None if fused else ("linear", intermediate * (2 if isinstance(mlp, Gated) else 1)),
    )


def _parse(shape: str, dtype: str) -> "Weight":
    from kernels.tuning.candidates import OPS, Weight

    found = SHAPE.fullmatch(shape)
    if found is None or found[1] not in OPS or "0" in (found[2], found[3]):
        raise TuneError(f"--shape {shape}: say OP:OUTxIN with OP one of {', '.join(OPS)}, as linear_add:4096x14336")
    return Weight(found[1], int(found[2]), int(found[3]), dtype)


def _list(weights: Sequence["Weight"], jobs: int, out: Path | None) -> None:
    from kernels.tuning.candidates import BUCKETS, all_candidates, candidates, space_hash

    print(f"{'weight':34}candidates beside cuBLAS, by rows")
    for weight in weights:
        counts = {bucket: len(candidates(weight, bucket)) for bucket in BUCKETS}
        print(f"{_name(weight):34}{'  '.join(f'{bucket}: {count}' for bucket, count in counts.items())}")
    forms = sum(len(all_candidates(weight)) for weight in weights)
    minutes = (forms * SECONDS_PER_FORM / jobs + len(weights) * len(BUCKETS) * SECONDS_PER_BUCKET) / 60
    print(f"{len(weights)} weights, {forms} forms to compile, about {minutes:.1f} min with {jobs} jobs")
    print(f"candidate space {space_hash()}, table {out or 'kernels/tuning/tables/<device>.json'}")


def _measure(weights: Sequence["Weight"], device_name: str, jobs: int, out: Path | None) -> None:
    device_name = _require_gpu(device_name)
    import torch

    from kernels.fused import linear
    from kernels.tuning.table import file_of
    from kernels.tuning.tuner import GraphStopwatch, Tuner, measure_ceilings

    started, device = time.monotonic(), torch.device(device_name)
    torch.cuda.set_device(device)
    here, properties = linear.here(device), torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin
    compiled = compile_all(weights, device_name, shared_bytes, jobs)
    print(f"{here}: {compiled} forms compiled in {time.monotonic() - started:.0f} s", flush=True)
    stopwatch = GraphStopwatch()
    ceilings = measure_ceilings(stopwatch, device_name)
    print(f"copies {ceilings.gigabytes_per_second} GB/s, multiplies {ceilings.teraflops} TFLOP/s", flush=True)
    prepare = functools.partial(linear.prepare, device=device)
    tuner = Tuner(
        prepare, stopwatch, ceilings, device=device_name, l2_bytes=properties.L2_cache_size, shared_bytes=shared_bytes
    )
    file = out or file_of(linear.TABLES.folder, here.name)
    fill(file, here, ceilings, weights, tuner)
    print(f"{file} written after {(time.monotonic() - started) / 60:.1f} min")


def _require_gpu(device: str) -> str:
    """The device with its number. Raises TuneError where nothing can be measured."""
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise TuneError(f"--device {device}: only GPUs are tuned, say cuda or cuda:N")
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise TuneError(f"{error.name} is not installed: install Sluice with its extra `gpu`") from error
    index, devices = int(named[1] or 0), torch.cuda.device_count()
    if index >= devices:
        raise TuneError(
            f"there is no CUDA device {index} here, and `sluice tune` measures on the GPU that it tunes for: "
            "run it there, or list what it would measure with --dry-run"
        )
    return f"cuda:{index}"


def fill(file: Path, here: "Device", ceilings: "Ceilings", weights: Iterable["Weight"], tuner: "Tuner") -> None:
    """Measure the weights and write the table after each, so that an end in between loses one weight at most.

    Rows of a table that the same versions measured here over the same candidates are kept.
    """
    from kernels.tuning.candidates import space_hash
    from kernels.tuning.table import Table, write

    table = _known(file, here)
    for weight in weights:
        rows = []
        for row in tuner.tune(weight):
            rows.append(row)
            print(_told(row), flush=True)
        now = datetime.now(UTC).date().isoformat()
        measured = Table(here, now, space_hash(), ceilings, tuple(rows))
        table = measured if table is None else table.merged(measured)
        write(file, table)
    for weight, rows_at, config, reason in tuner.refused:
        print(f"dropped: {_name(weight)} rows {rows_at} {config}: {reason}")


def _known(file: Path, here: "Device") -> "Table | None":
    from kernels.tuning.table import TableRefused, read

    if not file.is_file():
        return None
    try:
        table = read(file, here)
    except TableRefused as refusal:
        print(f"replaced: {refusal}")
        return None
    if table.device != here:
        print(f"replaced: {file} was measured with Triton {table.device.triton} and torch {table.device.torch}")
        return None
    return table


def compile_all(weights: Sequence["Weight"], device: str, shared_bytes: int, jobs: int) -> int:
    """Compile every form into Triton's cache on disk, by so many processes; returns how many were."""
    from kernels.tuning.candidates import all_candidates

    forms = [(weight, all_candidates(weight, shared_bytes)) for weight in weights]
    tasks = [(weight, configs[i::jobs], device) for weight, configs in forms for i in range(jobs)]
    if jobs == 1:
        return sum(map(compile_some, tasks))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(compile_some, tasks))


def compile_some(task: tuple["Weight", Sequence["Config"], str]) -> int:
    """Start each form once, on a row of anything. What does not compile is dropped when it is measured."""
    import torch

    from kernels.fused import linear

    weight, configs, device = task
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dtype = getattr(torch, weight.dtype)
    x = torch.zeros(1, weight.in_features, dtype=dtype, device=device)
    values = torch.empty(weight.halves * weight.out_features, weight.in_features, dtype=dtype, device=device)
    residual = torch.zeros(1, weight.out_features, dtype=dtype, device=device) if weight.op == "linear_add" else None
    compiled = 0
    for config in configs:
        with contextlib.suppress(Exception):
            linear.prepare(weight, config, 1, torch.device(device))(x, values, residual)
            compiled += 1
    return compiled


def _name(weight: "Weight") -> str:
    return f"{weight.op}:{weight.out_features}x{weight.in_features} {weight.dtype}"


def _told(row: "Row") -> str:
    against = row.cublas_microseconds / row.microseconds
    exact = f", exact {row.exact_microseconds:.1f} us" if row.exact_microseconds else ""
    return (
        f"{_name(row.weight):34} rows {row.rows:4} {row.microseconds:8.1f} us {row.fraction:6.1%} of the floor, "
        f"{against:.2f} x cuBLAS{exact}: {row.config or 'cuBLAS'}"
    )
