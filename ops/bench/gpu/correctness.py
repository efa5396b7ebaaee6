"""The tests of the fused kernels, run on this device: the same files that the test command has interpreted."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ops.bench.gpu.device import Device

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 300
TOY = ["tests/kernels/fused/test_norm.py"]


def measure(device: Device) -> dict[str, Any]:
    """Counts by outcome and the ids of what failed. Needs pytest and transformers; with pytest-xdist on many cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device.dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    files = TOY if device.dry else ["tests/kernels/fused"]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={ROOT}", "--confcutdir=tests/kernels"]
    command += ["-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "--import-mode=importlib", *files]
    if importlib.util.find_spec("xdist") and not device.dry:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--maxfail=60"]
    begin = time.perf_counter()
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**environment, "PYTHONPATH": path}, timeout=LIMIT_S
    )
    lines = done.stdout.splitlines()
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "exit_code": done.returncode,
        "said": lines[-1] if lines else done.stderr[-300:],
        "failed": failed,
        "why": [line for line in lines if line.startswith(("E  ", "/")) or "Error" in line][:40],
        "seconds": round(time.perf_counter() - begin, 1),
    }
