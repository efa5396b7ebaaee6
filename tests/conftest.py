"""What all tests have in common: a clean environment, and clusters of real processes."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.builders.cluster import RunningCluster, RunningService, running

# Triton's interpreter runs kernels on a CPU when this is set before a kernel's module is imported (lessons 22).
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test may depend on what the person who runs it has set, nor look for a hub.
KEPT = {"SLUICE_TEST_TIER", "SLUICE_TORCH_INDEX"}
for name in [name for name in os.environ if name.startswith("SLUICE_") and name not in KEPT]:
    del os.environ[name]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A thread that spins while it waits for another takes the core from who would end its waiting: tests run two at a time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

StartShared = Callable[..., RunningCluster]
StartOwn = Callable[..., AbstractContextManager[RunningCluster]]
StartService = Callable[..., RunningService]

CLUSTERS = pytest.StashKey[list[RunningCluster]]()
CLUSTERS_KEPT = 4
"""Of the shared ones; no test asks for more. Three hundred megabytes each, and idle ones wake up all the time."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CLUSTERS] = []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who runs what where `ops/scripts/test` uses two cores."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.sharing import BySharing

    return BySharing(config, log)


@pytest.fixture(scope="session")
def shared_clusters(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[StartShared]:
    """One running cluster per configuration, the last CLUSTERS_KEPT that were asked for. Prefer `cluster`."""
    by_flags: dict[str, RunningCluster] = {}  # the one asked for last is last
    alive = pytestconfig.stash[CLUSTERS]

    def get(**flags: Any) -> RunningCluster:
        key = repr(sorted(flags.items()))
        found = by_flags.pop(key, None)
        if found is None or found.process.poll() is not None:
            if len(by_flags) == CLUSTERS_KEPT:
                oldest = by_flags.pop(next(iter(by_flags)))
                alive.remove(oldest)
                assert oldest.stop() == 0, oldest.tail()
            found = RunningCluster(tmp_path_factory.mktemp("cluster"), flags)
            alive.append(found)
        by_flags[key] = found
        return found

    yield get
    for cluster in by_flags.values():
        assert cluster.stop() == 0, cluster.tail()


@pytest.fixture
def cluster(shared_clusters: StartShared) -> Iterator[StartShared]:
    """`cluster(max_num_seqs=4)`: a running cluster with these flags, shared by the tests that ask for the same.

    Every test leaves it as it found it: all blocks back, no request left, every process alive.
    """
    used: dict[int, RunningCluster] = {}

    def get(**flags: Any) -> RunningCluster:
        found = shared_clusters(**flags)
        used[id(found)] = found
        return found

    yield get
    for found in used.values():
        assert found.process.poll() is None, found.tail()
        found.assert_idle()


@pytest.fixture
def own_cluster(tmp_path: Path, pytestconfig: pytest.Config) -> StartOwn:
    """`with own_cluster(workers=2) as c:`: a cluster to be broken; nothing of it is left afterwards."""

    def start(**flags: Any) -> AbstractContextManager[RunningCluster]:
        folder = tmp_path / f"cluster-{len(list(tmp_path.iterdir()))}"
        return running(folder, flags)

    return start


@pytest.fixture
def service(tmp_path: Path) -> Iterator[StartService]:
    """`service("scheduler", port=0)`: one service by itself; ended with the test."""
    started: list[RunningService] = []

    def start(name: str, *, environ: dict[str, str] | None = None, **flags: Any) -> RunningService:
        started.append(RunningService(name, tmp_path, flags, environ))
        return started[-1]

    yield start
    for running_service in reversed(started):
        if running_service.process.poll() is None:
            running_service.process.kill()
        running_service.process.wait()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failure brings the words of the clusters that run."""
    report: pytest.TestReport = yield
    if report.failed and "shared_clusters" in getattr(item, "fixturenames", ()):
        for running_cluster in item.config.stash[CLUSTERS]:
            report.sections.append(("cluster", running_cluster.tail()))
    return report
