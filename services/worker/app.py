"""The worker process: constructs everything, serves until it is told to stop."""

import sys
from typing import Any

from services.worker.host import Loaded, OnEvent, Progress, host
from services.worker.plan import DeviceLostError
from services.worker.registration import RegistrationRefusedError
from shared.config import WorkerConfig
from shared.ids import new_instance_id
from shared.telemetry.logs import configure_logs

EXIT_REFUSED = 1
EXIT_DEVICE_LOST = 3


async def serve(config: WorkerConfig, *, on_event: OnEvent | None = None) -> int:
    """Serves one device until SIGTERM or SIGINT, then finishes the step in flight and returns 0.

    `on_event` is told "loading" (done_bytes, total_bytes), "registering" (scheduler) and "ready" (address, num_blocks,
    dtype, device, …). Returns 1, having said why on standard error and as "refused", where the scheduler will not have
    this worker, and 3 where the device was lost: whoever supervises it starts another. Raises BindError,
    CheckpointError, WorkerError or PoolTooSmall, each with a message for a person.
    """
    on_event = on_event or _ignore
    instance = new_instance_id("worker")
    configure_logs("sluice-worker", instance, config.log_format)
    try:
        return await host(config, lambda progress: _load(config, progress), instance=instance, on_event=on_event)
    except RegistrationRefusedError as error:
        message = f"the scheduler at {config.scheduler} refuses this worker: {error}"
        on_event("refused", {"message": message})
        print(f"sluice worker: {message}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except DeviceLostError as error:
        print(f"sluice worker: the device is lost, a new process must take it up: {error}", file=sys.stderr, flush=True)
        return EXIT_DEVICE_LOST


def _load(config: WorkerConfig, progress: Progress) -> Loaded:
    from services.worker.load import load  # torch comes with it, after the port is bound and health is answered

    return load(config, progress)


def _ignore(name: str, facts: dict[str, Any]) -> None:
    pass
