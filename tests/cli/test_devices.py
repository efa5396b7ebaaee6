"""Which device `sluice doctor --device auto` finds, by what nvidia-smi says."""

import pytest

from services.cli import devices
from services.cli.devices import GPUS, Device, device_named, known_gpu

CPU = Device("this machine's CPU", {"float32": 1e9}, 1e9, 2**30, "measured")


@pytest.mark.parametrize(
    ("card", "mebibytes", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", 81920, "a100"),
        ("NVIDIA A100-SXM4-40GB", 40960, None),
        ("NVIDIA A100 80GB PCIe", 81920, None),
        ("NVIDIA A100X", 81920, None),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H100 NVL", 95830, None),
        ("NVIDIA H100", 95830, None),
        ("NVIDIA GH200 480GB", 97871, None),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA B200", 183359, "b200"),
        ("NVIDIA GB200", 189471, None),
        ("NVIDIA L4", 23034, None),
    ],
)
def test_a_card_is_known_by_whole_words_and_by_its_memory(card: str, mebibytes: int, key: str | None) -> None:
    found = known_gpu(card, mebibytes * 2**20)
    assert (found and found.name) == (key and GPUS[key].name)
    assert found is None or found.memory_bytes == mebibytes * 2**20


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Says what it is given, whatever it is asked, and measuring the CPU takes no time."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(devices, "measure_cpu", lambda dtype: CPU)

    def say(words: str, status: int = 0) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{words}\nEND\nexit {status}\n")
        tool.chmod(0o755)

    return say


def test_the_first_card_is_described_with_the_memory_it_has(nvidia_smi) -> None:
    nvidia_smi("NVIDIA H100 80GB HBM3, 81559\nNVIDIA L4, 23034")
    found = device_named("auto", "bfloat16")
    assert (found.name, found.memory_bytes) == ("NVIDIA H100 80GB", 81559 * 2**20)


def test_a_card_that_is_not_known_is_named_beside_the_cpu_that_is_described(nvidia_smi) -> None:
    nvidia_smi("NVIDIA L4, 23034")
    found = device_named("auto", "float32")
    assert "NVIDIA L4, 22.5 GiB" in found.name
    assert found.name.startswith(CPU.name)
    assert (found.memory_bytes, found.how) == (CPU.memory_bytes, "measured")


def test_where_nvidia_smi_sees_no_card_the_cpu_is_described(nvidia_smi) -> None:
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver", status=9)
    assert device_named("auto", "float32") == CPU
