"""`sluice doctor`: what this machine can run, and what is missing; with `--model`, what a checkpoint takes."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.cli.output import REFUSED, fail, user_message
from services.cli.ports import holder, require_free
from shared.checkpoint import BUNDLED_FOLDER
from shared.config import ConfigError

GIB = 2**30
MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 2 * GIB
CPUINFO = Path("/proc/cpuinfo")
PORTS = {
    50051: "--grpc-port",
    8000: "--port",
    50052: "--scheduler-port",
    9052: "--metrics-port",
    50053: "--worker-port",
    9053: "--metrics-port",
}
"""Those of `sluice up` with one worker, and the flag that moves each."""
BFLOAT16_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "ARM BF16"}
"""What /proc/cpuinfo calls it, and how it is shown; a worker asks for the same flags."""


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `level`: ok, note (works, could be better) or missing (nothing can be served without)."""

    subject: str
    level: str
    what: str
    do: str = ""


MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "missing": "[red]✗[/]"}


def doctor(
    model: Annotated[
        str,
        typer.Option(metavar="DIR", help="Describe this checkpoint instead, from its config.json: a folder or hub id."),
    ] = "",
    context: Annotated[int, typer.Option(help="With --model: tokens of a request; 0: the model's longest.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="With --model: of weights and cache; auto: as the checkpoint says.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="With --model: auto (this machine's), cpu, a100, h100, h200 or b200.")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="With --model: tokens of a KV block.")] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine can run and what is missing. Exit code 0: `sluice up` can serve here; 1: it cannot.

    With --model, say what a checkpoint is instead: parameters, bytes, KV cache, how many requests fit, and from which
    batch on arithmetic is the limit. Exit code 2: it is no checkpoint that can be served.
    """
    if model:
        _describe(model, context=context, dtype=dtype, device=device, block_size=block_size, json_output=json_output)
        return
    findings = [finding for look in LOOKS for finding in look()]
    missing = [finding for finding in findings if finding.level == "missing"]
    if json_output:
        print(msgspec.json.encode(findings).decode())
    else:
        _print(findings, missing)
    raise typer.Exit(1 if missing else 0)


def _describe(model: str, *, json_output: bool, **options: Any) -> None:
    from services.cli.doctor_model import as_json, describe_model, print_model

    try:
        facts, device = describe_model(model, **options)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        fail(message)
        raise typer.Exit(REFUSED) from error
    if json_output:
        print(as_json(facts, device))
    else:
        print_model(facts, device)


def _print(findings: list[Finding], missing: list[Finding]) -> None:
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        do = f"  [dim]{escape(finding.do)}[/]" if finding.do else ""
        table.add_row(MARKS[finding.level], f"[bold]{finding.subject}[/]", f"{escape(finding.what)}{do}")
    console.print(table)
    console.print()
    if missing:
        names = ", ".join(finding.subject for finding in missing)
        console.print(
            f"[red]This machine cannot serve yet:[/] {names}. `sh ops/scripts/setup` installs what Python needs."
        )
    else:
        console.print(f"[green]This machine can serve:[/] {capabilities()}")


def capabilities() -> str:
    """What a worker here would compute with."""
    dtypes = "float32" if not _bf16_flags() else "float32 and fast bfloat16"
    memory = psutil.virtual_memory().available / GIB
    return f"models of up to about {memory * 0.6 / 2:.0f} B parameters in bfloat16 on the CPU ({dtypes})"


def look_at_python() -> Iterable[Finding]:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        yield Finding("python", "missing", version, "Sluice needs 3.11 or newer")
    else:
        yield Finding("python", "ok", f"{version} at {sys.executable}")


def look_at_cpu() -> Iterable[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or usable
    yield Finding("cores", "ok", f"{usable} usable, {physical} physical, {platform.machine()}")
    flags = _bf16_flags()
    if flags:
        yield Finding("bfloat16", "ok", f"fast: {', '.join(flags)}")
    else:
        yield Finding(
            "bfloat16", "note", "no AVX512-BF16, AMX or ARM BF16: bfloat16 works but slowly", "prefer --dtype float32"
        )


def _bf16_flags() -> list[str]:
    """Of the first core, by CPUINFO; empty where that is not there."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    have = set(line.partition(":")[2].split())
    return [shown for name, shown in BFLOAT16_FLAGS.items() if name in have]


def look_at_memory() -> Iterable[Finding]:
    memory = psutil.virtual_memory()
    what = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}"
    low = memory.available < MIN_FREE_BYTES
    yield Finding("memory", "note" if low else "ok", what, "the bundled model needs about 1 GiB" if low else "")


def look_at_packages() -> Iterable[Finding]:
    for name in ("grpcio", "protobuf", "tokenizers", "safetensors", "msgspec", "uvloop"):
        version = _version(name)
        if version is None and name != "uvloop":
            yield Finding(name, "missing", "not installed", "sh ops/scripts/setup")
        elif version is None:
            yield Finding(name, "note", "not installed: the standard event loop is used")
    torch = _version("torch")
    if torch is None:
        yield Finding("torch", "missing", "not installed: a worker computes with it", "sh ops/scripts/setup")
    else:
        yield Finding("torch", "ok", torch)
    numba = _version("numba")
    if numba:
        yield Finding("numba", "ok", numba)
    else:
        yield Finding("numba", "note", "not installed: bfloat16 on a CPU is slower", "sh ops/scripts/setup")
    triton = _version("triton")
    if triton:
        yield Finding("triton", "ok", triton)
    elif sys.platform == "linux":
        yield Finding("triton", "note", "not installed: needed for a GPU only", "sh ops/scripts/setup")


def look_at_gpu() -> Iterable[Finding]:
    tool = shutil.which("nvidia-smi")
    query = [tool or "", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() if tool else ""
    except (OSError, subprocess.TimeoutExpired):
        listing = ""
    if not listing:
        yield Finding("gpu", "note", "no NVIDIA GPU: a worker runs on the CPU")
    for i, line in enumerate(listing.splitlines()):
        yield Finding(f"gpu {i}", "ok", line)


def look_at_ports() -> Iterable[Finding]:
    for port, flag in PORTS.items():
        try:
            require_free("127.0.0.1", port, flag=flag)
        except ConfigError:
            yield Finding(f"port {port}", "note", f"taken{holder(port)}", f"choose another with {flag}")
            continue
        yield Finding(f"port {port}", "ok", "free")


def look_at_model() -> Iterable[Finding]:
    if not (BUNDLED_FOLDER / "config.json").is_file():
        yield Finding("bundled model", "note", "not found", "run from a clone, or name a model with --model")
        return
    size = sum(file.stat().st_size for file in BUNDLED_FOLDER.glob("*.safetensors"))
    yield Finding("bundled model", "ok", f"{size / 2**20:.1f} MiB at {BUNDLED_FOLDER}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


LOOKS: tuple[Callable[[], Iterable[Finding]], ...] = (
    look_at_python,
    look_at_cpu,
    look_at_memory,
    look_at_packages,
    look_at_gpu,
    look_at_ports,
    look_at_model,
)
