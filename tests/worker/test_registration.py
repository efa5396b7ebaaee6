import asyncio
import contextlib

import pytest

from services.worker.host import identify
from services.worker.registration import Registration, RegistrationRefusedError
from services.worker.wire import RegistryClient
from shared import PROTOCOL_VERSION
from shared.net.channel import internal_metadata, open_internal_channel
from tests.builders.pretend_worker import PretendRunner, pretend_loaded
from tests.builders.registry import FakeRegistry, serve_registry

IDENTITY = identify(pretend_loaded(PretendRunner(num_blocks=77)), "worker-test", "127.0.0.1:5")


class Registering:
    def __init__(self, address, token=""):
        self.changes = []
        self.progress = 0
        self._channel = open_internal_channel(address)
        self.registration = Registration(
            RegistryClient(self._channel, internal_metadata(token)),
            IDENTITY,
            progress=lambda: self.progress,
            on_change=self._on_change,
        )

    async def _on_change(self, registered):
        self.changes.append(registered)

    async def __aenter__(self):
        self.task = asyncio.create_task(self.registration.run())
        return self

    async def __aexit__(self, *error):
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RegistrationRefusedError):
            await self.task
        await self._channel.close()


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_a_worker_registers_all_its_facts_and_renews_with_its_progress():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry, Registering(registry.address) as worker:
            await registry.until(registered=1)
            request = registry.registered[0]
            assert request.worker == "worker-test"
            assert request.protocol_version == PROTOCOL_VERSION
            assert (request.num_blocks, request.block_size, request.vocab_size) == (77, 16, 512)
            assert (request.rank, request.world, request.address) == (0, 1, "127.0.0.1:5")
            worker.progress = 41
            await registry.until(renewed=2)
            assert registry.renewed[-1].progress == 41
            assert len(registry.registered) == 1
            assert worker.changes == [True]

    run(scenario())


def test_renewals_come_at_a_third_of_the_lease():
    async def scenario():
        async with serve_registry(FakeRegistry(ttl_ms=600)) as registry, Registering(registry.address):
            await registry.until(registered=1)
            started = asyncio.get_running_loop().time()
            await registry.until(renewed=3)
            assert 0.5 < asyncio.get_running_loop().time() - started < 1.2

    run(scenario())


def test_a_lease_that_is_not_found_leads_to_a_new_registration():
    async def scenario():
        async with serve_registry(FakeRegistry()) as registry, Registering(registry.address) as worker:
            await registry.until(registered=1)
            registry.forget()
            await registry.until(registered=2)
            await registry.until(renewed=1)
            assert registry.renewed[-1].lease == 2
            assert worker.changes == [True, False, True]

    run(scenario())


def test_a_hurried_worker_notices_a_restarted_scheduler_before_its_next_renewal():
    async def scenario():
        async with serve_registry(FakeRegistry(ttl_ms=60_000)) as registry, Registering(registry.address) as worker:
            await registry.until(registered=1)
            await asyncio.sleep(0.05)
            registry.forget()
            worker.registration.hurry()
            await registry.until(registered=2, timeout_s=5)

    run(scenario())


def test_a_worker_waits_for_a_scheduler_that_is_not_there_yet():
    async def scenario():
        async with serve_registry(FakeRegistry()) as gone:
            address = gone.address
        async with Registering(address) as worker:
            await asyncio.sleep(0.3)
            assert not worker.task.done()
            async with serve_registry(FakeRegistry(), port=int(address.split(":")[1])) as registry:
                await registry.until(registered=1)

    run(scenario())


def test_a_worker_that_does_not_fit_is_told_why():
    async def scenario():
        refusing = FakeRegistry(refusal="block size 16, the others have 32")
        async with serve_registry(refusing) as registry, Registering(registry.address) as worker:
            with pytest.raises(RegistrationRefusedError, match="block size 16, the others have 32"):
                await worker.task

    run(scenario())


def test_the_internal_token_is_sent_and_a_wrong_one_is_fatal():
    async def scenario():
        async with serve_registry(FakeRegistry(), token="secret") as registry:
            async with Registering(registry.address, token="secret"):
                await registry.until(registered=1)
            async with Registering(registry.address, token="other") as worker:
                with pytest.raises(RegistrationRefusedError, match="token"):
                    await worker.task

    run(scenario())


def test_a_worker_that_is_hurried_and_told_to_stop_at_once_stops():
    async def scenario():
        async with serve_registry(FakeRegistry(ttl_ms=60_000)) as registry, Registering(registry.address) as worker:
            await registry.until(registered=1)
            await asyncio.sleep(0.05)  # it waits for its next renewal
            worker.registration.hurry()
            worker.task.cancel()
            await asyncio.wait({worker.task}, timeout=2)
            assert worker.task.cancelled()

    run(scenario())
