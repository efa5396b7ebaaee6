"""Which port each service of `sluice up` listens on, and that none of them is taken."""

from collections.abc import Mapping
from typing import Any

from services.cli.flags import fields_of
from services.cli.ports import free_port, require_free
from shared.config import ConfigError, RouterConfig, SchedulerConfig, UpConfig, WorkerConfig

INTERNAL_HOST = "127.0.0.1"
HTTP = "-http"
"""Behind a service's name: its HTTP port."""
TRIES = 20
"""The system may offer one port twice, since none is held yet."""


def choose_ports(
    up: UpConfig, router: RouterConfig, scheduler: SchedulerConfig, worker: WorkerConfig, *, given: Mapping[str, Any]
) -> dict[str, int]:
    """Name → port, none of them taken. With `--grpc-port 0` all are free ones, unless they are given.

    The names are router, scheduler, worker-0, worker-1, … and each of them with HTTP behind it.
    """
    host = router.host.strip("[]")
    wanted = _wanted(up, router, scheduler, worker, given)
    ports: dict[str, int] = {}
    for name, port in wanted.items():
        its_host = host if name.startswith("router") else INTERNAL_HOST
        port = port or _free(its_host, taken={*ports.values(), *wanted.values()}, flag=_flag_of(name))
        sharing = next((other for other, its_port in ports.items() if its_port == port), None)
        if sharing:
            raise ConfigError(f"{sharing} and {name} would share port {port}; choose another with {_flag_of(name)}")
        require_free(its_host, port, flag=_flag_of(name))
        ports[name] = port
    return ports


def _wanted(
    up: UpConfig, router: RouterConfig, scheduler: SchedulerConfig, worker: WorkerConfig, given: Mapping[str, Any]
) -> dict[str, int]:
    """Name → port, 0 for a free one."""
    free = router.grpc_port == 0
    metrics_told = _told("metrics_port", up.metrics_port, given)
    ports = {"router": router.grpc_port, "scheduler": up.scheduler_port}
    first_worker, scheduler_http, first_http = up.worker_port, up.metrics_port, up.metrics_port and up.metrics_port + 1
    if not _told("scheduler_port", up.scheduler_port, given):
        ports["scheduler"] = 0 if free else scheduler.port
    if not _told("worker_port", up.worker_port, given):
        first_worker = 0 if free else worker.port
    if not metrics_told:
        scheduler_http, first_http = (0, 0) if free else (scheduler.metrics_port, worker.metrics_port)
    for i in range(up.workers):
        ports[f"worker-{i}"] = first_worker and first_worker + i
    http_told = "port" in given or router.port != fields_of(RouterConfig)["port"].default
    ports["router" + HTTP] = router.port if http_told or not free else 0
    ports["scheduler" + HTTP] = scheduler_http
    for i in range(up.workers):
        ports[f"worker-{i}{HTTP}"] = first_http and first_http + i
    return ports


def _told(name: str, value: int, given: Mapping[str, Any]) -> bool:
    """Whether somebody set this field of `up`; else the service's own section speaks."""
    return name in given or value != fields_of(UpConfig)[name].default


def _free(host: str, *, taken: set[int], flag: str) -> int:
    for _ in range(TRIES):
        port = free_port(host, flag=flag)
        if port not in taken:
            return port
    raise ConfigError(f"no free port on {host} in {TRIES} tries; choose one with {flag}")


def _flag_of(name: str) -> str:
    if name.endswith(HTTP):
        return "--port" if name == "router" + HTTP else "--metrics-port"
    return {"router": "--grpc-port", "scheduler": "--scheduler-port"}.get(name, "--worker-port")
