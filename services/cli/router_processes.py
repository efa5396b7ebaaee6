"""`sluice router --router-processes N`: N routers on the same ports, kept by this process.

The kernel spreads connections over them (SO_REUSEPORT). This process holds the ports, so that they stay ours while one
of them is restarted, and a folder for the sockets by which they ask each other (services/router/peers.py).
"""

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.cli.cluster import STOP_MARGIN_S
from services.cli.events import OnEvent
from services.cli.flags import secrets_of, to_argv
from services.cli.output import fail
from services.cli.ports import bind_shared, require_free
from services.cli.supervise import AllReady, Died, Line, Notice, Outcome, Ready, ServiceSpec, Supervisor
from shared.config import RouterConfig
from shared.net.address import join_address


def run_processes(config: RouterConfig, *, file: str, flags: Mapping[str, Any], on_event: OnEvent) -> int:
    """Runs the processes until SIGTERM, SIGINT or Drain; returns the exit code. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="sluice-router-") as folder, _held_ports(config) as ports:
        specs = make_specs(config, file=file, flags=flags, folder=folder, ports=ports)
        where = {
            "grpc": join_address(config.host, ports[0]),
            "http": join_address(config.host, ports[1]),
            "processes": config.router_processes,
        }
        outcome = asyncio.run(_supervise(specs, where, on_event))
    if outcome.message:
        on_event("refused", {"message": outcome.message})
        fail(outcome.message)
    return outcome.exit_code


def make_specs(
    config: RouterConfig, *, file: str, flags: Mapping[str, Any], folder: str, ports: tuple[int, int]
) -> list[ServiceSpec]:
    """One for each process. `ports` are gRPC's and HTTP's; what was told as a flag each of them is told too."""
    own = {
        "router_processes": 1,
        "grpc_port": ports[0],
        "port": ports[1],
        "max_num_queued_reqs": -(-config.max_num_queued_reqs // config.router_processes),
    }
    told = {key: value for key, value in flags.items() if key not in own}
    command = [sys.executable, "-P", "-m", "services.cli.main", "router", *to_argv({**told, **own})]
    command += [f"--config={file}"] if file else []
    return [
        ServiceSpec(
            name=f"router-{index}",
            argv=(*command, f"--peers={folder}:{index}:{config.router_processes}"),
            environ=secrets_of(flags),
            stop_timeout_s=config.shutdown_timeout + STOP_MARGIN_S,
            ends_cluster=True,
        )
        for index in range(config.router_processes)
    ]


@contextlib.contextmanager
def _held_ports(config: RouterConfig) -> Iterator[tuple[int, int]]:
    """The ports of gRPC and HTTP, bound and not listened on. Raises ConfigError where one is taken."""
    with contextlib.ExitStack() as stack:
        ports = []
        for port, flag in ((config.grpc_port, "--grpc-port"), (config.port, "--port")):
            if port:
                require_free(config.host, port, flag=flag)  # a stranger who would share it is refused all the same
            held = stack.enter_context(bind_shared(config.host, port, flag=flag))
            ports.append(held.getsockname()[1])
        yield ports[0], ports[1]


async def _supervise(specs: Sequence[ServiceSpec], where: Mapping[str, Any], on_event: OnEvent) -> Outcome:
    models: list[str] = []

    def observe(notice: Notice) -> None:
        match notice:
            case Line(_, text):
                print(text, file=sys.stderr, flush=True)
            case Ready(_, data, _):
                models[:] = data.get("models", [])
            case AllReady():
                on_event("ready", {**where, "models": list(models)})
            case Died(name, how, delay_s):
                print(f"{name} {how}; restarting in {delay_s:g} s", file=sys.stderr, flush=True)

    supervisor = Supervisor(specs, observe)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.request_stop)
    return await supervisor.run()
