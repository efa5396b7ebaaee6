"""One worker process around a runner: server, health, device thread, registration, signals. Torch-free."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import structlog

from services.worker.execute.device_thread import DeviceThread
from services.worker.grammars import GrammarCompiler, LoadVocabulary
from services.worker.identity import WorkerIdentity
from services.worker.metrics import WorkerMetrics
from services.worker.plan import StepPlan, StepResult, StepRunner
from services.worker.registration import Registration
from services.worker.servicer import SERVICE_NAME, ExecutionServicer
from services.worker.steps import StepTraces
from services.worker.wire import RegistryClient
from services.worker.work import StepCosts
from shared.cache_groups import Window
from shared.config import WorkerConfig, tracing_config
from shared.net.address import join_address
from shared.net.channel import internal_metadata, open_internal_channel
from shared.net.health import Health
from shared.net.http import HttpDoor
from shared.net.options import INTERNAL_MESSAGE_BYTES
from shared.net.server import bind, create_server, require_private
from shared.telemetry.otlp import Exporter, warn_of_ignored

log = structlog.get_logger("worker")

OnEvent = Callable[[str, dict[str, Any]], None]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from the loading thread."""

STOP_TIMEOUT_S = 30.0
"""How long the step in flight may take at the end."""
WRITE_GRACE_S = 0.5
LAST_TRACES_S = 2.0
"""What sending the last traces may take."""
WILDCARD_HOSTS = frozenset({"0.0.0.0", "::", "[::]"})

Value = TypeVar("Value")


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A runner ready for plans, and what the scheduler must know of it."""

    runner: StepRunner
    costs: StepCosts
    model_fingerprint: str
    dtype: str
    device: str
    block_size: int
    num_blocks: int
    block_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    windows: tuple[Window, ...] = (None,)
    """Of each cache group."""
    table_verdicts: Mapping[str, int] = {}
    """Of a GPU's tables of products, see kernels.ops.forms."""
    load_vocabulary: LoadVocabulary | None = None
    """The model's tokens for grammars; None: it serves no structured output."""


Load = Callable[[Progress], Loaded]


class LoadStopped(Exception):
    """Raised out of the progress callback when the worker is stopped while it loads."""


async def host(config: WorkerConfig, load: Load, *, instance: str, on_event: OnEvent) -> int:
    """Binds, loads on a thread, registers, and serves until SIGTERM or SIGINT. Returns the exit code 0.

    Raises BindError, RegistrationRefusedError, DeviceLostError, and whatever `load` raises.
    """
    require_private(config.host, config.internal_token)
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        async with _serving(config, instance) as door:
            try:
                loaded = await _load_on_thread(load, stop, on_event)
            except LoadStopped:
                return 0
            identity = identify(loaded, instance, config.advertise or _reachable(config.host, door.port))
            _describe(door.metrics, config, loaded)
            await _execute(config, loaded, identity, door, stop, on_event)
    return 0


def identify(loaded: Loaded, instance: str, address: str) -> WorkerIdentity:
    """What this process registers with."""
    own = ("runner", "costs", "windows", "table_verdicts", "load_vocabulary")
    facts = {name: getattr(loaded, name) for name in Loaded.__struct_fields__ if name not in own}
    windows = tuple(window or 0 for window in loaded.windows)
    return WorkerIdentity(worker=instance, address=address, windows=windows, **facts)


def _describe(metrics: WorkerMetrics, config: WorkerConfig, loaded: Loaded) -> None:
    metrics.describe(
        loaded.runner,
        loaded.costs,
        loaded.max_num_seqs,
        loaded.table_verdicts,
        block_size=loaded.block_size,
        num_gpu_blocks=loaded.num_blocks,
        block_bytes=loaded.block_bytes,
        cache_dtype=loaded.dtype,
        device=loaded.device,
        max_model_len=loaded.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )


def _reachable(bind_host: str, port: int) -> str:
    return join_address(socket.gethostname() if bind_host in WILDCARD_HOSTS else bind_host, port)


@dataclass(slots=True, frozen=True)
class _Door:
    """What the process serves, and where."""

    servicer: ExecutionServicer
    health: Health
    metrics: WorkerMetrics
    port: int
    http: str
    """Where /metrics is."""


@contextlib.asynccontextmanager
async def _serving(config: WorkerConfig, instance: str) -> AsyncIterator[_Door]:
    server = create_server(max_receive_bytes=INTERNAL_MESSAGE_BYTES, token=config.internal_token)
    servicer = ExecutionServicer()
    servicer.add_to(server)
    health = Health(server, (SERVICE_NAME,))
    port = bind(server, config.host, config.port)
    exporter = _exporter(config)
    metrics = WorkerMetrics(lambda: exporter.dropped_spans if exporter else 0)
    http = HttpDoor(config.host, config.metrics_port, metrics.exposition, flag="--metrics-port")
    steps = StepTraces(config.slow_step_ms, exporter.add, instance=instance) if exporter else None

    def on_result(plan: StepPlan, result: StepResult) -> None:
        metrics.on_result(plan, result)
        if steps is not None:
            steps.on_result(plan, result)

    servicer.on_result = on_result
    metrics.lag.start()
    await health.set_serving(False)
    await server.start()
    try:
        yield _Door(servicer, health, metrics, port, http.address)
    finally:
        metrics.lag.stop()
        http.close()
        servicer.close()
        await server.stop(WRITE_GRACE_S)
        if exporter is not None:
            await asyncio.to_thread(exporter.close, LAST_TRACES_S)


def _exporter(config: WorkerConfig) -> Exporter | None:
    """Where slow steps are told of, if anywhere. Raises ConfigError."""
    tracing = tracing_config(config.otlp_traces_endpoint)
    warn_of_ignored(tracing.ignored)
    return Exporter(tracing.export) if tracing.export and config.slow_step_ms else None


async def _execute(
    config: WorkerConfig,
    loaded: Loaded,
    identity: WorkerIdentity,
    door: _Door,
    stop: asyncio.Event,
    on_event: OnEvent,
) -> None:
    device = DeviceThread(loaded.runner)
    device.start()
    door.servicer.attach(device, GrammarCompiler(loaded.load_vocabulary))
    channel = open_internal_channel(config.scheduler)
    registry = RegistryClient(channel, internal_metadata(config.internal_token))
    on_event("registering", {"scheduler": config.scheduler})

    async def on_change(registered: bool) -> None:
        await door.health.set_serving(registered)
        if registered:
            on_event("ready", {**_ready_facts(identity), "metrics": door.http})

    registration = Registration(registry, identity, progress=lambda: device.progress, on_change=on_change)
    door.servicer.on_stream_end = registration.hurry
    try:
        await _until_stopped(registration, stop, device.lost)
    finally:
        door.servicer.on_stream_end = lambda: None
        await door.health.set_serving(False)
        if not await device.stop(STOP_TIMEOUT_S):
            log.error("step_abandoned", after_s=STOP_TIMEOUT_S)
        await channel.close()


def _ready_facts(identity: WorkerIdentity) -> dict[str, Any]:
    names = ("address", "num_blocks", "block_size", "dtype", "device", "max_model_len", "worker")
    return {name: getattr(identity, name) for name in names}


async def _until_stopped(registration: Registration, stop: asyncio.Event, lost: "asyncio.Future[None]") -> None:
    """Returns when told to stop; raises what ended the registration, or DeviceLostError."""
    registering = asyncio.create_task(registration.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({registering, stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (lost, registering):
            if ended.done():
                ended.result()
    finally:
        registering.cancel()
        stopping.cancel()
        await asyncio.gather(registering, stopping, return_exceptions=True)


async def _load_on_thread(load: Load, stop: asyncio.Event, on_event: OnEvent) -> Loaded:
    """Loads with progress; raises LoadStopped as soon as the worker is told to stop."""
    loop = asyncio.get_running_loop()
    stopped = threading.Event()

    def progress(done_bytes: int, total_bytes: int) -> None:
        if stopped.is_set():
            raise LoadStopped
        loop.call_soon_threadsafe(on_event, "loading", {"done_bytes": done_bytes, "total_bytes": total_bytes})

    loading = asyncio.ensure_future(_on_daemon_thread(lambda: load(progress)))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loading.done():
        return loading.result()
    stopped.set()
    loading.cancel()
    raise LoadStopped


async def _on_daemon_thread(function: Callable[[], Value]) -> Value:
    """Unlike a thread of the executor this one does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Value] = loop.create_future()

    def settle(value: Value | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await result


@contextlib.contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets `stop`; the second ends the process at once."""
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    owned = threading.current_thread() is threading.main_thread()
    for number in signals if owned else ():
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in signals if owned else ():
            loop.remove_signal_handler(number)
