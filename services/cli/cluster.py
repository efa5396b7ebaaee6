"""What `sluice up` starts: the addresses of a local cluster and the command line of each of its processes."""

import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import psutil

from services.cli.cluster_ports import HTTP, INTERNAL_HOST, choose_ports
from services.cli.flags import KINDS, Flag, build, fields_of, make_flags, secrets_of, to_argv
from services.cli.supervise import ServiceSpec
from shared.config import RouterConfig, SchedulerConfig, UpConfig, WorkerConfig
from shared.net.address import join_address

STOP_MARGIN_S = 5.0
"""What a service may take beyond its drain before it is killed."""

PLACED_HERE = frozenset({"scheduler", "advertise"})
"""Fields that `up` fills in itself: it knows where each service is."""
ROUTERS_OWN = frozenset({"host", "port"})
"""Fields that mean the router when they are told to `up`."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A local cluster, not yet started."""

    router: str
    """HOST:PORT for clients."""
    scheduler: str
    workers: tuple[str, ...]
    http: dict[str, str]
    """Where each service answers HTTP: service → HOST:PORT."""
    specs: tuple[ServiceSpec, ...]
    model: str


def up_flags() -> list[Flag]:
    """The union of the services' flags and the cluster's own."""
    return make_flags((UpConfig, RouterConfig, SchedulerConfig, WorkerConfig), without=PLACED_HERE)


def plan_cluster(flags: Mapping[str, Any], *, file: str = "") -> Cluster:
    """Checks every setting and every port. Raises ConfigError before anything is started."""
    internal = {key: value for key, value in flags.items() if key not in ROUTERS_OWN}
    up: UpConfig = build("up", file=file, flags=flags)
    router: RouterConfig = build("router", file=file, flags=flags)
    scheduler: SchedulerConfig = build("scheduler", file=file, flags=internal, without_variables=ROUTERS_OWN)
    worker: WorkerConfig = build("worker", file=file, flags=internal, without_variables=ROUTERS_OWN)
    ports = choose_ports(up, router, scheduler, worker, given=flags)
    scheduler_at, workers = f"{INTERNAL_HOST}:{ports['scheduler']}", [f"worker-{i}" for i in range(up.workers)]
    shares = _shares(worker, up.workers)

    def spec(name: str, section: str, rank: int, own: Mapping[str, Any], drain_s: float) -> ServiceSpec:
        known = {key: value for key, value in flags.items() if key in fields_of(KINDS[section])}
        # `-P` keeps the folder that the user stands in off the import path.
        command = (sys.executable, "-P", "-m", "services.cli.main", section, *to_argv({**known, **own}))
        return ServiceSpec(
            name=name,
            argv=(*command, *((f"--config={file}",) if file else ())),
            environ=secrets_of(flags),
            stop_rank=rank,
            stop_timeout_s=drain_s + STOP_MARGIN_S,
            ends_cluster=section == "router",
        )

    def at_home(name: str) -> dict[str, Any]:
        return {"host": INTERNAL_HOST, "port": ports[name], "metrics_port": ports[name + HTTP]}

    of_worker = {"scheduler": scheduler_at, "advertise": "", **shares}
    of_router = {"grpc_port": ports["router"], "port": ports["router" + HTTP], "scheduler": (scheduler_at,)}
    specs = [
        spec("scheduler", "scheduler", 1, at_home("scheduler"), scheduler.shutdown_timeout),
        *(spec(name, "worker", 2, {**at_home(name), **of_worker}, 0) for name in workers),
        spec("router", "router", 0, of_router, router.shutdown_timeout),
    ]
    public = _reachable(router.host)
    return Cluster(
        router=join_address(public, ports["router"]),
        scheduler=scheduler_at,
        workers=tuple(f"{INTERNAL_HOST}:{ports[name]}" for name in workers),
        http={
            name: join_address(public if name == "router" else INTERNAL_HOST, ports[name + HTTP])
            for name in ("router", "scheduler", *workers)
        },
        specs=tuple(specs),
        model=(router.served_model_name or (worker.model,))[0],
    )


def _shares(worker: WorkerConfig, workers: int) -> dict[str, float]:
    """Several workers share cores and memory: without this each would take them all."""
    if workers == 1:
        return {}
    shares: dict[str, float] = {}
    if not worker.threads:
        shares["threads"] = max(1, (psutil.cpu_count(logical=False) or 1) // workers)
    shares["gpu_memory_utilization"] = worker.gpu_memory_utilization / workers
    return shares


def _reachable(host: str) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    return INTERNAL_HOST if host in ("0.0.0.0", "", "[::]", "::") else host
