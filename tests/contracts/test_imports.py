"""Router, scheduler and the command line run where torch is not installed, and start quickly."""

import subprocess
import sys

import pytest

BLOCK_AND_IMPORT = """
import sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "triton", "transformers", "kernels"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
began = time.process_time()
for name in sys.argv[1:]:
    __import__(name)
print(time.process_time() - began)
"""

MODULES = {
    "router": ("services.router.app",),
    "scheduler": ("services.scheduler.app",),
    "cli": tuple(
        f"services.cli.{name}"
        for name in ("main", "up", "serve", "generate", "chat", "demo", "doctor", "client", "cluster", "supervise")
    ),
}


def cpu_seconds(modules: tuple[str, ...]) -> float:
    done = subprocess.run([sys.executable, "-c", BLOCK_AND_IMPORT, *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("service", MODULES)
def test_it_imports_without_torch_in_under_a_second(service: str) -> None:
    cpu_seconds(MODULES[service])  # once, so that no compilation of modules counts
    assert min(cpu_seconds(MODULES[service]) for _ in range(3)) < 1.0


def test_the_block_blocks() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK_AND_IMPORT, "torch"], capture_output=True, text=True)
    assert "torch is blocked" in done.stderr
