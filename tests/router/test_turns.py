"""A thread that is shared fairly by those who ask for it."""

import asyncio
import threading

import pytest

from services.router.turns import FairThread


@pytest.fixture
def thread():
    shared = FairThread("fair")
    yield shared
    shared.close()


async def held(thread: FairThread) -> tuple[threading.Event, asyncio.Task]:
    """A job that keeps the thread until the event is set."""
    release, begun = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        release.wait(30)

    task = asyncio.create_task(thread.run("holder", job))
    await asyncio.to_thread(begun.wait, 10)
    return release, task


def test_an_asker_with_few_jobs_does_not_wait_for_all_of_another(thread):
    async def test() -> list[str]:
        done: list[str] = []
        release, holder = await held(thread)
        jobs = [asyncio.create_task(thread.run("many", done.append, f"many {n}")) for n in range(5)]
        await asyncio.sleep(0)
        jobs += [asyncio.create_task(thread.run("few", done.append, f"few {n}")) for n in range(2)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(holder, *jobs)
        return done

    assert asyncio.run(test()) == ["many 0", "few 0", "many 1", "few 1", "many 2", "many 3", "many 4"]


def test_what_a_job_returns_or_raises_comes_back(thread):
    async def test() -> None:
        assert await thread.run("a", int, "7") == 7
        with pytest.raises(ValueError, match="seven"):
            await thread.run("a", int, "seven")
        assert await thread.run("a", int, "8") == 8

    asyncio.run(test())


def test_a_job_that_is_cancelled_while_it_waits_is_not_begun_and_the_rest_go_on(thread):
    async def test() -> list[str]:
        done: list[str] = []
        release, holder = await held(thread)
        jobs = [asyncio.create_task(thread.run("a", done.append, name)) for name in ("first", "second", "third")]
        await asyncio.sleep(0)
        jobs[1].cancel()
        release.set()
        await holder
        await asyncio.gather(jobs[0], jobs[2])
        return done

    assert asyncio.run(test()) == ["first", "third"]


def test_a_turn_that_comes_as_its_job_is_cancelled_goes_to_the_next(thread):
    async def test() -> list[str]:
        done: list[str] = []
        release, holder = await held(thread)
        jobs = [asyncio.create_task(thread.run("a", done.append, name)) for name in ("first", "second")]
        await asyncio.sleep(0)
        begin_next = thread._begin_next

        def cancel_the_first() -> None:
            begin_next()
            jobs[0].cancel()

        thread._begin_next = cancel_the_first
        release.set()
        await holder
        thread._begin_next = begin_next
        async with asyncio.timeout(10):
            await jobs[1]
        return done

    assert asyncio.run(test()) == ["second"]


def test_the_thread_is_kept_by_a_job_whose_asker_has_gone(thread):
    """Else whoever leaves at once could put any number of jobs before those of others."""

    async def test() -> list[str]:
        done: list[str] = []
        release, holder = await held(thread)
        holder.cancel()
        await asyncio.sleep(0)
        jobs = [asyncio.create_task(thread.run(asker, done.append, asker)) for asker in ("many", "many", "few")]
        await asyncio.sleep(0.05)
        assert not done
        release.set()
        await asyncio.gather(*jobs)
        return done

    assert asyncio.run(test()) == ["many", "few", "many"]
