"""compose.yaml and ops/k8s say what the services understand, and what their schemas allow."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ops.docker import exercise
from services.cli.flags import KINDS, fields_of, flag
from shared.config import load_config

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
K8S = ROOT / "ops" / "k8s"
OURS = ("router", "scheduler", "worker")
DRAIN_S = 30.0


def manifests(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder; without kubectl, the base's files as they are."""
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))
    if folder.name != "base":
        pytest.skip("no kubectl here to build an overlay with")
    files = [path for path in sorted(folder.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [one for path in files for one in yaml.safe_load_all(path.read_text())]


def containers(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for one in manifests(folder):
        if one["kind"] in ("Deployment", "StatefulSet"):
            pod = one["spec"]["template"]["spec"]
            yield from ((pod, container) for container in pod["containers"])


def assert_understood(arguments: list[str], environment: dict[str, str]) -> None:
    """A service's command line names flags that it has, and variables that are fields of one."""
    service, *rest = arguments
    known = {flag(name) for name in fields_of(KINDS[service])}
    named = [part.partition("=")[0] for part in rest if part.startswith("--")]
    assert set(named) <= known, set(named) - known
    load_config(KINDS[service], section=service, environ=environment, flags={})


@pytest.mark.parametrize("service", OURS)
def test_composes_services_are_started_with_flags_that_they_have(service):
    spec = COMPOSE["services"][service]
    own = {name: str(value) for name, value in spec["environment"].items() if name.startswith("SLUICE_")}
    assert_understood(spec["command"], own)
    assert spec["read_only"]
    assert spec["cap_drop"] == ["ALL"]
    assert float(spec["stop_grace_period"].removesuffix("s")) > DRAIN_S
    assert spec["healthcheck"]["test"][1:4] == ["python", "-m", "services.cli.probe"]


def test_the_bare_cluster_is_three_services():
    bare = {name for name, spec in COMPOSE["services"].items() if not spec.get("profiles")}
    assert bare == set(OURS)
    assert all(port.startswith("127.0.0.1:") for spec in COMPOSE["services"].values() for port in spec.get("ports", []))


def test_every_file_that_compose_mounts_is_there():
    for spec in COMPOSE["services"].values():
        for volume in spec.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source


def test_compose_itself_accepts_the_files():
    command = exercise.find_compose("")
    if command is None:
        pytest.skip("docker compose is not installed")
    for files in (["compose.yaml"], ["compose.yaml", "ops/docker/compose.gpu.yaml"]):
        chosen = [part for file in files for part in ("-f", file)]
        done = subprocess.run(
            [*command, *chosen, "--profile", "observe", "config", "-q"], cwd=ROOT, capture_output=True
        )
        assert done.returncode == 0, done.stderr


def test_each_worker_has_a_gpu_of_its_own():
    """Compose gives the replicas of one service the same device, so that there is a service for each."""
    gpu = yaml.safe_load((ROOT / "ops" / "docker" / "compose.gpu.yaml").read_text())["services"]
    workers = {name: spec for name, spec in gpu.items() if name.startswith("worker")}
    devices = {
        name: spec["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for name, spec in workers.items()
    }
    assert devices == {name: [name.removeprefix("worker-") if "-" in name else "0"] for name in workers}
    for count in (2, 4, 8):
        started = [n for n, spec in workers.items() if f"{count}-gpus" in spec.get("profiles", [f"{count}-gpus"])]
        assert len(started) == count
    for spec in workers.values():
        assert_understood(spec["command"], {})
        assert spec["pid"] == spec["ipc"] == "service:namespaces"


@pytest.mark.parametrize("folder", ["base", "overlays/gpu"])
def test_manifests_are_valid_to_the_letter(folder):
    made = manifests(K8S / folder)
    assert {one["kind"] for one in made} >= {"Deployment", "StatefulSet", "HorizontalPodAutoscaler", "Service"}
    for one in made:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("folder", ["base", "overlays/gpu"])
def test_pods_drain_before_they_are_killed_and_run_with_flags_that_their_service_has(folder):
    for pod, container in containers(K8S / folder):
        assert_understood(container["args"], {})
        drains = [part for part in container["args"] if part.startswith("--shutdown-timeout=")]
        drain_s = float(drains[0].partition("=")[2]) if drains else DRAIN_S
        assert pod["terminationGracePeriodSeconds"] > drain_s
        assert pod["enableServiceLinks"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.timeout(2400)
def test_compose_runs_for_real(capsys):
    if reason := exercise.missing(exercise.find_compose("")):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["exercise"])
        assert exercise.main() == 0
    assert "nothing left" in capsys.readouterr().out
