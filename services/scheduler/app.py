"""The scheduler process: constructs everything, serves until told to stop, drains, ends."""

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import structlog

from services.scheduler.core.scheduler import CoreConfig, Scheduler
from services.scheduler.loop import Loop
from services.scheduler.metrics import SchedulerMetrics, StepMeter
from services.scheduler.publish import Publisher
from services.scheduler.servicer import ControlServicer, RegistryServicer, SchedulingServicer
from services.scheduler.wire import SchedulerState, state_message
from services.scheduler.workers import WorkerEvents, Workers
from shared.clock import NS_PER_MS, monotonic_ns
from shared.config import SchedulerConfig
from shared.ids import new_instance_id
from shared.net.address import join_address
from shared.net.health import Health
from shared.net.http import HttpDoor
from shared.net.options import INTERNAL_MESSAGE_BYTES
from shared.net.server import bind, create_server, require_private
from shared.outcome import AbortCause
from shared.telemetry.lag import LoopLag
from shared.telemetry.logs import configure_logs

log = structlog.get_logger("scheduler")

WATCH_INTERVAL_S = 0.2
SERVICES = ("sluice.v1.Scheduling", "sluice.v1.Registry", "sluice.v1.Control")
OnEvent = Callable[[str, dict[str, Any]], None]


async def serve(config: SchedulerConfig, *, on_event: OnEvent | None = None) -> int:
    """Runs a scheduler until SIGTERM or SIGINT; returns the exit code. Raises BindError for an address it cannot
    have. `on_event("ready", {"address": …})` says when it listens."""
    instance = new_instance_id("scheduler")
    configure_logs("sluice-scheduler", instance, config.log_format)
    return await _App(config, instance).run(on_event or (lambda name, fields: None))


class _App:
    """Owns every long-lived object of the process."""

    def __init__(self, config: SchedulerConfig, instance: str) -> None:
        self._config = config
        self._instance = instance
        self._stop: asyncio.Queue[float | None] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._publisher = Publisher(monotonic_ns, config.link_stall_timeout_ms * NS_PER_MS)
        self._workers = Workers(
            scheduler=instance,
            token=config.internal_token,
            ttl_ms=config.lease_ttl_ms,
            stuck_ms=config.heartbeat_timeout_ms,
            epoch=time.time_ns(),
            now_ns=monotonic_ns,
        )
        core, meter = Scheduler(_core_config(config)), StepMeter()
        self._loop = Loop(
            core,
            self._workers,
            self._publisher,
            max_plans_in_flight=config.max_plans_in_flight,
            now_ns=monotonic_ns,
            fatal=self._fail,
            check_every_step=config.check_invariants,
            meter=meter,
        )
        self._lag = LoopLag()
        self._metrics = SchedulerMetrics(
            core,
            meter,
            lag=self._lag.histogram,
            num_violations=lambda: self._loop.num_violations,
            heard_ns=self._workers.heard_ns,
            now_ns=monotonic_ns,
        )
        self._publisher.state = self._state
        self._publisher.loads = self._loop.loads
        self._publisher.request_turn = self._loop.request_turn
        self._workers.events = WorkerEvents(
            self._loop.on_ready, self._loop.on_result, self._loop.on_lost, self._loop.on_prepared
        )

    async def run(self, on_event: OnEvent) -> int:
        config = self._config
        require_private(config.host, config.internal_token)
        server = create_server(max_receive_bytes=INTERNAL_MESSAGE_BYTES, token=config.internal_token)
        SchedulingServicer(self._loop, self._publisher, monotonic_ns).add_to(server)
        RegistryServicer(self._workers, self._loop).add_to(server)
        ControlServicer(self._loop, instance=self._instance, now_ns=monotonic_ns, drain=self._stop).add_to(server)
        health = Health(server, SERVICES)
        port = bind(server, config.host, config.port)
        door = HttpDoor(config.host, config.metrics_port, self._metrics.exposition, flag="--metrics-port")
        await server.start()
        await health.set_serving(True)
        _on_signals(self._stop)
        watcher = asyncio.create_task(self._watch(), name="watch")
        self._lag.start()
        where = {"address": join_address(config.host, port), "metrics": door.address}
        log.info("ready", **where)
        on_event("ready", where)
        try:
            timeout_s = await self._stop.get()
            await health.set_serving(False)
            await self._drain(config.shutdown_timeout if timeout_s is None else timeout_s)
        finally:
            watcher.cancel()
            self._lag.stop()
            door.close()
            await self._workers.close()
            await server.stop(0.2)
        return 70 if self._failure else 0

    async def _drain(self, timeout_s: float) -> None:
        """Refuses what is new, finishes what runs; what is left at the timeout, or at a second signal, is aborted."""
        self._loop.draining = True
        self._publisher.publish_state()
        if self._failure is None and not self._loop.idle.is_set():
            idle = asyncio.ensure_future(self._loop.idle.wait())
            again = asyncio.ensure_future(self._stop.get())
            await asyncio.wait((idle, again), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
            again.cancel()
            self._loop.abort_all(AbortCause.DRAIN)
        await asyncio.sleep(0.05)  # the last frames leave
        for link in self._publisher.links:
            link.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            self._workers.watch()
            self._publisher.beat()
            for link in self._publisher.stalled():
                log.warning("link_stalled", router=link.router, unsent=link.num_unsent)
                self._loop.abort_link(link)

    def _fail(self, error: BaseException) -> None:
        """The core is in doubt: say so and end; whoever supervises starts a new one."""
        log.error("core_failed", exc_info=error)
        self._failure = error
        self._stop.put_nowait(0.0)

    def _state(self) -> SchedulerState:
        return state_message(
            self._workers.identity,
            scheduler=self._instance,
            ready=self._loop.ready,
            draining=self._loop.draining,
            max_model_len=self._config.max_model_len,
        )


def _core_config(config: SchedulerConfig) -> CoreConfig:
    return CoreConfig(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_num_queued_reqs=config.max_num_queued_reqs,
        policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def _on_signals(stop: "asyncio.Queue[float | None]") -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.put_nowait, None)
