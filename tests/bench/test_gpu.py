"""The script that waits for a GPU runs end to end without one, so that a lease is not spent on its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")
ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.timeout(600)
def test_every_section_runs_dry(tmp_path):
    out = tmp_path / "gpu.json"
    done = bench("--dry-run", "--out", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    result = json.loads(out.read_text())
    assert result["correctness"]["exit_code"] == 0
    assert result["ipc"]["real_block_read"] and result["ipc"]["poisoned_block_read"]
    assert result["ipc"]["dead_owner"] != "opened"
    cases = {name: case for name, case in result["kernels"].items() if name != "section_s"}
    assert result["decode"].keys() >= {"decode 2 x 20", "prefill 24"}
    assert len(cases) >= 8 and all(case["ours_us"] > 0 for case in cases.values())
    assert cases["paged prefill, 16"]["flex_unpaged_us"] > 0
    assert "varlen_unpaged_error" in cases["paged prefill, 16"], "it needs a GPU, and says so"
    assert cases["paged decode, 2 x 24, pages of 8 layers"]["per_layer_us"] > 0
    assert result["engine"]["llama-3.1-8b tail"]["output_tokens_per_s"] > 0
    assert all(result["engine"]["llama-3.1-8b exact"][f"exact_{share}_tokens_per_s"] > 0 for share in (0, 10, 100))
    assert result["engine"]["llama-3.1-8b blocks_back"] is True
    assert result["engine"]["llama-3.1-8b none_compiled_late"] is True
    assert result["peers"].keys() >= {"eager batch 1", "compiled equal", "compiled tail", "continuous tail"}


@pytest.mark.parametrize(
    ("end", "none"),
    [
        ({"scheduler": {}, "worker-0": {"sluice:late_compilations_total": 0.0}}, True),
        (
            {"worker-0": {"sluice:late_compilations_total": 0.0}, "worker-1": {"sluice:late_compilations_total": 2.0}},
            False,
        ),
        ({"scheduler": {}, "worker-0": {}}, False),
        ({"error": "refused", "log": ""}, False),
    ],
    ids=["none", "some", "silent", "gone"],
)
def test_a_kernel_compiled_in_live_traffic_fails_the_engines_section(end, none):
    from ops.bench.gpu.engine import none_compiled_late

    assert none_compiled_late(end) is none


def test_without_a_gpu_it_says_what_to_do():
    done = bench("--sections", "ceilings", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "--dry-run" in done.stderr


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("kernels", {"a": {"ours_us": 1.0}, "section_s": 2.0}, []),
        ("kernels", {"a": {"ours_us": 1.0}, "b": {"error": "out of memory"}}, ["kernels: b"]),
        ("ipc", {"real_block_read": False, "dead_owner": "opened"}, ["ipc: real_block_read", "ipc: dead_owner"]),
        ("correctness", {"exit_code": 1}, ["correctness"]),
        ("ceilings", {"error": "no"}, ["ceilings"]),
    ],
)
def test_what_went_wrong_is_told_and_not_only_noted(name, found, expected):
    from ops.bench.gpu.__main__ import problems

    assert problems(name, found) == expected
