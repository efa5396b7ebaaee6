"""What `sluice up` starts: the addresses of a local cluster and the command line of each of its processes."""

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import psutil

from services.cli.flags import KINDS, SECRETS, Flag, build, fields_of, make_flags, to_argv
from services.cli.ports import free_port, require_free
from services.cli.supervise import ServiceSpec
from shared.config import ConfigError, RouterConfig, SchedulerConfig, UpConfig, WorkerConfig
from shared.net.address import join_address

INTERNAL_HOST = "127.0.0.1"
STOP_MARGIN_S = 5.0
"""What a service may take beyond its drain before it is killed."""

PLACED_HERE = frozenset({"port", "scheduler", "advertise"})
"""Fields that `up` fills in itself: it knows where each service is."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A local cluster, not yet started."""

    router: str
    """HOST:PORT for clients."""
    scheduler: str
    workers: tuple[str, ...]
    specs: tuple[ServiceSpec, ...]
    model: str


def up_flags() -> list[Flag]:
    """The union of the services' flags and the cluster's own."""
    return make_flags((UpConfig, RouterConfig, SchedulerConfig, WorkerConfig), without=PLACED_HERE)


def plan_cluster(flags: Mapping[str, Any], *, file: str = "") -> Cluster:
    """Checks every setting and every port. Raises ConfigError before anything is started."""
    internal = {key: value for key, value in flags.items() if key != "host"}
    up: UpConfig = build("up", file=file, flags=flags)
    router: RouterConfig = build("router", file=file, flags=flags)
    scheduler: SchedulerConfig = build("scheduler", file=file, flags=internal)
    worker: WorkerConfig = build("worker", file=file, flags=internal)
    ports = _choose_ports(up, router, scheduler.port, worker.port, given=flags)
    scheduler_at, worker_ports = f"{INTERNAL_HOST}:{ports['scheduler']}", _worker_ports(ports)
    secrets = {f"SLUICE_{name.upper()}": str(flags[name]) for name in SECRETS if name in flags}
    shares = _shares(worker, up.workers)

    def spec(name: str, section: str, rank: int, own: Mapping[str, Any], drain_s: float) -> ServiceSpec:
        known = {key: value for key, value in flags.items() if key in fields_of(KINDS[section])}
        # `-P` keeps the folder that the user stands in off the import path.
        command = (sys.executable, "-P", "-m", "services.cli.main", section, *to_argv({**known, **own}))
        return ServiceSpec(
            name=name,
            argv=(*command, *((f"--config={file}",) if file else ())),
            environ=secrets,
            stop_rank=rank,
            stop_timeout_s=drain_s + STOP_MARGIN_S,
            ends_cluster=section == "router",
        )

    at_home = {"host": INTERNAL_HOST}
    specs = [
        spec("scheduler", "scheduler", 1, {**at_home, "port": ports["scheduler"]}, scheduler.shutdown_timeout),
        *(
            spec(name, "worker", 2, {**at_home, "port": port, "scheduler": scheduler_at, "advertise": "", **shares}, 0)
            for name, port in worker_ports.items()
        ),
        spec(
            "router",
            "router",
            0,
            {"grpc_port": ports["router"], "scheduler": (scheduler_at,)},
            router.shutdown_timeout,
        ),
    ]
    return Cluster(
        router=join_address(_reachable(router.host), ports["router"]),
        scheduler=scheduler_at,
        workers=tuple(f"{INTERNAL_HOST}:{port}" for port in worker_ports.values()),
        specs=tuple(specs),
        model=(router.served_model_name or (worker.model,))[0],
    )


def _choose_ports(
    up: UpConfig, router: RouterConfig, scheduler_port: int, worker_port: int, *, given: Mapping[str, Any]
) -> dict[str, int]:
    """Name → port, none of them taken, in the order router, scheduler, worker-0, worker-1, …

    With `--grpc-port 0` the internal ports are free ones too, unless they are given.
    """
    free = router.grpc_port == 0
    wanted = {
        "scheduler": _internal_port("scheduler_port", up.scheduler_port, scheduler_port, free, given),
        "worker": _internal_port("worker_port", up.worker_port, worker_port, free, given),
    }
    ports = {"router": router.grpc_port or free_port(_bindable(router.host), flag="--grpc-port")}
    ports["scheduler"] = wanted["scheduler"] or free_port()
    for i in range(up.workers):
        ports[f"worker-{i}"] = wanted["worker"] + i if wanted["worker"] else free_port()
    seen: dict[int, str] = {}
    for name, port in ports.items():
        if port in seen:
            raise ConfigError(f"{seen[port]} and {name} would share port {port}; choose another with {_flag_of(name)}")
        seen[port] = name
        require_free(_bindable(router.host) if name == "router" else INTERNAL_HOST, port, flag=_flag_of(name))
    return ports


def _internal_port(name: str, own: int, services: int, free: bool, given: Mapping[str, Any]) -> int:
    """`--scheduler-port` if it says anything, else what the service's own section says; 0 asks for a free one."""
    if name in given or own != fields_of(UpConfig)[name].default:
        return own
    return 0 if free else services


def _flag_of(name: str) -> str:
    return {"router": "--grpc-port", "scheduler": "--scheduler-port"}.get(name, "--worker-port")


def _worker_ports(ports: Mapping[str, int]) -> dict[str, int]:
    return {name: port for name, port in ports.items() if name.startswith("worker-")}


def _shares(worker: WorkerConfig, workers: int) -> dict[str, float]:
    """Several workers share cores and memory: without this each would take them all."""
    if workers == 1:
        return {}
    shares: dict[str, float] = {}
    if not worker.threads:
        shares["threads"] = max(1, (psutil.cpu_count(logical=False) or 1) // workers)
    shares["gpu_memory_utilization"] = worker.gpu_memory_utilization / workers
    return shares


def _bindable(host: str) -> str:
    return host.strip("[]")


def _reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    return INTERNAL_HOST if host in ("0.0.0.0", "", "[::]", "::") else host
