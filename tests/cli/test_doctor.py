"""`sluice doctor` says what is there and what is missing."""

import json
import socket
from pathlib import Path

import pytest

from services.cli import cluster_ports, doctor
from services.worker.load import FAST_BFLOAT16_FLAGS
from shared.checkpoint import BUNDLED_FOLDER
from shared.config import RouterConfig, SchedulerConfig, UpConfig, WorkerConfig
from tests.cli.test_flags import sluice


def test_this_machine_is_described_and_can_serve() -> None:
    done = sluice("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert {"python", "cores", "bfloat16", "memory", "torch", "port 50051", "bundled model"} <= set(findings)
    assert (done.returncode == 0) == all(finding["level"] != "missing" for finding in findings.values())
    assert "Traceback" not in done.stderr


def test_the_summary_for_people_ends_with_what_this_machine_can_run() -> None:
    assert "This machine can" in sluice("doctor").stdout


def test_a_missing_torch_means_that_nothing_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else real(name))
    assert [f.level for f in doctor.look_at_packages() if f.subject == "torch"] == ["missing"]


def test_a_taken_port_is_noted_with_the_flag_that_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "--grpc-port"})
        (finding,) = doctor.look_at_ports()
    assert finding.level == "note"
    assert "--grpc-port" in finding.do


def test_every_port_of_up_is_looked_at_with_the_flag_that_moves_it() -> None:
    ports = cluster_ports._wanted(UpConfig(), RouterConfig(), SchedulerConfig(), WorkerConfig(), {})
    assert {port: cluster_ports._flag_of(name) for name, port in ports.items()} == doctor.PORTS


def test_little_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available, total = 2**28, 2**30

    monkeypatch.setattr(doctor.psutil, "virtual_memory", Memory)
    (finding,) = doctor.look_at_memory()
    assert (finding.level, finding.what) == ("note", "0.2 GiB available of 1.0")


def test_the_bundled_model_is_the_one_that_workers_load_and_not_its_draft() -> None:
    (finding,) = doctor.look_at_model()
    assert (finding.level, finding.what.endswith(f" MiB at {BUNDLED_FOLDER}")) == ("ok", True)


@pytest.mark.parametrize("flag", sorted(FAST_BFLOAT16_FLAGS))
def test_bfloat16_is_fast_where_a_worker_takes_it_for_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    label = "Features" if flag == "bf16" else "flags"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{label}\t\t: fp {flag} crc32\n")
    monkeypatch.setattr(doctor, "CPUINFO", tmp_path / "cpuinfo")
    assert [f.level for f in doctor.look_at_cpu() if f.subject == "bfloat16"] == ["ok"]


def test_what_to_do_about_a_missing_package_is_the_setup_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert {f.do for f in doctor.look_at_packages()} <= {"sh ops/scripts/setup", ""}


def test_a_checkpoint_is_described_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((BUNDLED_FOLDER / "config.json").read_text())
    done = sluice("doctor", "--model", str(tmp_path), "--device", "h100", "--context", "512", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    model, device = told["model"], told["device"]
    assert (model["architecture"], model["dtype"], model["context"]) == ("llama", "bfloat16", 512)
    assert model["weight_bytes"] == 2 * model["total_parameters"]
    assert model["requests"] == model["num_blocks"] // 32
    assert model["ratio"] == pytest.approx(device["flops"]["bfloat16"] / device["bytes_per_second"])


def test_weights_that_do_not_fit_are_said_not_to_instead_of_counting_blocks(tmp_path: Path) -> None:
    config = json.loads((BUNDLED_FOLDER / "config.json").read_text()) | {"num_hidden_layers": 1_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = " ".join(sluice("doctor", "--model", str(tmp_path), "--device", "h100").stdout.split())
    assert "does not fit" in said
    assert "GiB of weights are more than the 67.1 GiB of NVIDIA H100 80GB" in said
    assert "blocks that fit" not in said


def test_what_is_said_of_a_checkpoint_to_people_names_everything() -> None:
    said = sluice("doctor", "--model", "bundled", "--device", "cpu").stdout
    for word in (
        "parameters",
        "weights",
        "cache of a token",
        "blocks that fit",
        "requests that fit",
        "B*",
        "(measured)",
    ):
        assert word in said, said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", str(BUNDLED_FOLDER), "--device", "abacus"], "--device abacus"),
        (["--model", str(BUNDLED_FOLDER), "--context", "99999999"], "--context 99999999"),
        (["--model", str(BUNDLED_FOLDER), "--dtype", "int3"], "--dtype int3"),
        (["--model", str(BUNDLED_FOLDER), "--block-size", "0"], "--block-size 0"),
    ],
    ids=["folder", "device", "context", "dtype", "block size"],
)
def test_a_checkpoint_or_an_option_that_cannot_be_is_refused_by_name(options: list[str], words: str) -> None:
    done = sluice("doctor", *options)
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
