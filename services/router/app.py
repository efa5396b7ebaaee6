"""Builds the router from its configuration, serves until told to stop, and drains."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from services.router.admission import Admission
from services.router.certificate import Certificate
from services.router.fleet import Expected, Fleet
from services.router.gate import Gate
from services.router.guard import KeyInterceptor
from services.router.http.answering import Answering
from services.router.http.door import Door
from services.router.http.guard import Guard
from services.router.http.routes import Api
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel, load_model
from services.router.peers import OwnAnswers, PeerPlace, Peers
from services.router.rejections import Rejections
from services.router.servicer import RouterControl, RouterInference, add_servicers
from services.router.session import Session
from services.router.traces import Traces
from services.router.turns import FairThread
from shared.clock import monotonic_ns
from shared.config import RouterConfig, tracing_config
from shared.ids import new_instance_id
from shared.net.address import join_address
from shared.net.health import Health
from shared.net.server import bind, create_server
from shared.net.tls import Tls
from shared.outcome import AbortCause
from shared.telemetry.exposition import Exposition
from shared.telemetry.lag import LoopLag
from shared.telemetry.logs import configure_logs
from shared.telemetry.otlp import Exporter, warn_of_ignored

log = structlog.get_logger("router")

OnEvent = Callable[[str, dict[str, Any]], None]
SERVICES = ("sluice.v1.Inference", "sluice.v1.Control")
SIZE_HEADROOM_BYTES = 64 * 2**10
"""Beyond --max-request-bytes: so much more is read, so that the refusal can be ours."""
LAST_TRACES_S = 2.0
"""What sending the last traces may take."""
GOODBYE_S = 2.0
"""What aborted streams may take to write their ends."""
LAST_ANSWERS_S = 0.5
"""What answers already given, Drain's own among them, may take to leave."""


async def serve(config: RouterConfig, *, on_event: OnEvent | None = None, place: PeerPlace | None = None) -> int:
    """Runs the router until SIGTERM, SIGINT or Drain; returns the exit code.

    `on_event("serving", …)` once the port is open, `on_event("ready", …)` once a scheduler can answer too. `place`:
    this is one of several processes on the same ports. Raises BindError, ModelError, CheckpointError.
    """
    instance = new_instance_id("router")
    configure_logs("sluice-router", instance, config.log_format)
    model = await asyncio.to_thread(load_model, config)
    return await Router(config, model, instance, on_event or (lambda name, data: None), place).serve()


class Router:
    """Every long-lived object of one router, and how they end."""

    def __init__(
        self,
        config: RouterConfig,
        model: ServedModel,
        instance: str,
        on_event: OnEvent,
        place: PeerPlace | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._on_event = on_event
        self._stop = _Stop()
        self._announced = False
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""
        self._able = False
        self._lag = LoopLag()
        self.metrics = RouterMetrics()
        self._rejections = Rejections(self.metrics, monotonic_ns)
        self._gate = Gate(config.api_key, config.api_key_file, monotonic_ns)
        self.admission = Admission(config.max_num_queued_reqs, monotonic_ns, place.count if place else 1)
        self.fleet = Fleet(
            config.scheduler,
            router=instance,
            token=config.internal_token,
            expected=Expected(model_fingerprint=model.fingerprint, vocab_size=model.vocab_size),
        )
        self._tokenizing = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenize")
        self._checking = FairThread("check-structure")
        tracing = tracing_config(config.otlp_traces_endpoint)
        warn_of_ignored(tracing.ignored)
        self._exporter = Exporter(tracing.export) if tracing.export else None
        self.traces = Traces(tracing.sampler, self._exporter.add if self._exporter else None)
        self._shares_ports = place is not None
        files = Tls(ssl_ca_certs=config.ssl_ca_certs, ssl_certfile=config.ssl_certfile, ssl_keyfile=config.ssl_keyfile)
        self._certificate = Certificate(files) if files != Tls() else None
        self._server = create_server(
            max_receive_bytes=config.max_request_bytes + SIZE_HEADROOM_BYTES,
            interceptors=[KeyInterceptor(self._gate, self._rejections)],
            reuse_port=self._shares_ports,
        )
        self._exposition = self._make_exposition()
        self.peers = Peers(place)
        self._health_changed = asyncio.Event()
        session = self._session(instance)
        self._add_servicers(session, instance)
        self._health = Health(self._server, SERVICES)
        self._http = self._http_door(session)

    def _make_exposition(self) -> Exposition:
        exporter = self._exporter
        return self.metrics.exposition(
            lag=self._lag.histogram, num_dropped_spans=lambda: exporter.dropped_spans if exporter else 0
        )

    def _session(self, instance: str) -> Session:
        return Session(
            model=self._model,
            fleet=self.fleet,
            admission=self.admission,
            tokenizing=self._tokenizing,
            checking=self._checking,
            max_unread_bytes=self._config.max_unread_bytes,
            traces=self.traces,
            metrics=self.metrics,
            rejections=self._rejections,
            instance=instance,
            now=monotonic_ns,
            log_content=self._config.log_content,
        )

    def _add_servicers(self, session: Session, instance: str) -> None:
        inference = RouterInference(
            model=self._model,
            session=session,
            fleet=self.fleet,
            admission=self.admission,
            gate=self._gate,
            rejections=self._rejections,
            peers=self.peers,
            max_request_bytes=self._config.max_request_bytes,
            stall_timeout_ms=self._config.stall_timeout_ms,
        )
        control = RouterControl(
            model=self._model,
            fleet=self.fleet,
            admission=self.admission,
            traces=self.traces,
            instance=instance,
            peers=self.peers,
            drain=_drainer(self.admission, self._health_changed, self._stop),
            now=monotonic_ns,
        )
        add_servicers(self._server, inference, control)

    def _http_door(self, session: Session) -> Door:
        config = self._config
        answering = Answering(
            session=session,
            admission=self.admission,
            rejections=self._rejections,
            max_request_bytes=config.max_request_bytes,
            stall_timeout_ms=config.stall_timeout_ms,
        )
        api = Api(
            model=self._model,
            fleet=self.fleet,
            answering=answering,
            tokenizing=self._tokenizing,
            exposition=self._exposition,
            peers=self.peers,
            healthy=lambda: self._able,
        )
        guarded: ASGIApp = Guard(api.application(), self._gate, self._rejections)
        if config.allowed_origins:  # a page's first question brings no key
            guarded = CORSMiddleware(guarded, config.allowed_origins, allow_methods=["*"], allow_headers=["*"])
        return Door(
            guarded,
            config.host,
            config.port,
            flag="--port",
            certificate=self._certificate,
            shares_port=self._shares_ports,
        )

    async def serve(self) -> int:
        """Until told to stop. 0 after a drain, however it went; 1 when a second signal cut requests off."""
        try:
            await self._open()
            with self._stop.on_signals():
                await self._until_stopped()
                return await self._drain()
        finally:
            await asyncio.gather(self._server.stop(LAST_ANSWERS_S), self._http.close(LAST_ANSWERS_S))
            await self.peers.close()
            self._lag.stop()
            self._tokenizing.shutdown(wait=False, cancel_futures=True)
            self._checking.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._exporter is not None:
                await asyncio.to_thread(self._exporter.close, LAST_TRACES_S)

    async def _open(self) -> None:
        config, certificate = self._config, self._certificate
        credentials = certificate.credentials if certificate else None
        port = bind(self._server, config.host, config.grpc_port, flag="--grpc-port", credentials=credentials)
        self._address = join_address(self._config.host, port)
        await self.peers.open(
            OwnAnswers(
                admission=self.admission,
                traces=self.traces,
                exposition=self._exposition,
                drain=_drainer(self.admission, self._health_changed, self._stop),
            )
        )
        await self._http.start()
        self._lag.start()
        self.fleet.on_change(self._health_changed.set)
        await self._server.start()
        log.info(
            "serving",
            grpc=self._address,
            http=self._http.address,
            models=self._model.names,
            schedulers=self._config.scheduler,
        )
        self._on_event("serving", self._where())

    async def _until_stopped(self) -> None:
        """Neither the fleet nor the health report ends by itself: if one does it is a bug, and the process says so
        rather than limp on."""
        working = [asyncio.create_task(self.fleet.run(), name="fleet")]
        working.append(asyncio.create_task(self._report_health(), name="health"))
        self._tasks = [*working, asyncio.create_task(self._stop.wait(), name="stop")]
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in working:
            if task.done():
                task.result()

    def stop(self) -> None:
        """As SIGTERM would."""
        self._stop.request()

    def _where(self) -> dict[str, Any]:
        return {"grpc": self._address, "http": self._http.address, "models": list(self._model.names)}

    async def _report_health(self) -> None:
        """Healthy is: would answer a request now."""
        while True:
            able = self._able = self.fleet.num_usable > 0 and not self.admission.draining
            await self._health.set_serving(able)
            if able and not self._announced:
                self._announced = True
                log.info("ready", grpc=self._address)
                self._on_event("ready", self._where())
            await self._health_changed.wait()
            self._health_changed.clear()

    # Ending.

    async def _drain(self) -> int:
        """Refuses what is new, lets what is in flight end, and ends it itself when the time is up."""
        await _drainer(self.admission, self._health_changed, self._stop)(None)
        timeout_s = self._config.shutdown_timeout if self._stop.timeout_s is None else self._stop.timeout_s
        log.info("draining", requests=len(self.admission), timeout_s=timeout_s)
        ending = asyncio.create_task(self.admission.wait_empty(timeout_s), name="drain")
        forced = asyncio.create_task(self._stop.wait_forced(), name="second-signal")
        try:
            await asyncio.wait((ending, forced), return_when=asyncio.FIRST_COMPLETED)
            cut = len(self.admission)
            if cut:
                self.admission.abort_all(AbortCause.DRAIN)
                await self.admission.wait_empty(0.2 if forced.done() else GOODBYE_S)
            log.info("drained", requests_cut=cut, forced=forced.done())
            return 1 if cut and forced.done() else 0
        finally:
            ending.cancel()
            forced.cancel()


def _drainer(
    admission: Admission, health_changed: asyncio.Event, stop: "_Stop"
) -> Callable[[float | None], Awaitable[None]]:
    """Refuses new requests from now on, and has the router stop. It knows not the router: a server whose handlers
    lead back to it is freed after its loop, which grpc complains about."""

    async def drain(timeout_s: float | None) -> None:
        admission.draining = True
        health_changed.set()
        stop.request(timeout_s)

    return drain


class _Stop:
    """SIGTERM, SIGINT or Drain, once: drain. A second signal: at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._forced = asyncio.Event()
        self._signals = 0
        self.timeout_s: float | None = None

    def request(self, timeout_s: float | None = None) -> None:
        if not self._asked.is_set():
            self.timeout_s = timeout_s
            self._asked.set()

    def _signalled(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._forced.set()
        self.request()

    async def wait(self) -> None:
        await self._asked.wait()

    async def wait_forced(self) -> None:
        await self._forced.wait()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
