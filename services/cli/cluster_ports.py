"""Which port each service of `sluice up` listens on, and that none of them is taken."""

from collections.abc import Mapping
from typing import Any

from services.cli.flags import Kind, fields_of
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
    all_free = router.grpc_port == 0

    def settle(kind: Kind, name: str, value: int, services: int, offset: int = 0) -> int:
        """`value` if somebody set this field, else what the service's own section says, or a free one."""
        if name in given or value != fields_of(kind)[name].default:
            return value and value + offset
        return 0 if all_free else services

    first = settle(UpConfig, "worker_port", up.worker_port, worker.port)
    first_http = settle(UpConfig, "metrics_port", up.metrics_port, worker.metrics_port, offset=1)
    workers = [(f"worker-{i}", i) for i in range(up.workers)]
    return {
        "router": router.grpc_port,
        "scheduler": settle(UpConfig, "scheduler_port", up.scheduler_port, scheduler.port),
        **{name: first and first + i for name, i in workers},
        "router" + HTTP: settle(RouterConfig, "port", router.port, router.port),
        "scheduler" + HTTP: settle(UpConfig, "metrics_port", up.metrics_port, scheduler.metrics_port),
        **{name + HTTP: first_http and first_http + i for name, i in workers},
    }


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
