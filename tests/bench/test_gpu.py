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
    assert result["decode"]["decode 2 x 20"]["graph_sampled_tokens_per_s"] > 0
    assert cases["add + RMSNorm"]["over_transformers"] > 0
    assert len(cases) >= 8 and all(case["ours_us"] > 0 for case in cases.values())
    assert cases["paged prefill, 16"]["flex_unpaged_us"] > 0
    assert "varlen_unpaged_error" in cases["paged prefill, 16"], "it needs a GPU, and says so"
    assert cases["paged decode, 2 x 24, pages of 8 layers"]["per_layer_us"] > 0
    assert result["engine"]["llama-3.1-8b tail"]["output_tokens_per_s"] > 0
    assert all(result["engine"]["llama-3.1-8b exact"][f"exact_{share}_tokens_per_s"] > 0 for share in (0, 10, 100))
    assert result["engine"]["llama-3.1-8b exactness"]["mismatches"] == 0
    assert result["engine"]["llama-3.1-8b blocks_back"] is True
    assert result["engine"]["llama-3.1-8b none_compiled_late"] is True
    assert result["peers"].keys() >= {"eager batch 1", "compiled equal", "compiled tail", "continuous tail"}


@pytest.mark.timeout(300)
def test_exact_requests_are_exact_under_preemption_and_a_soak_fails_none(tmp_path):
    out = tmp_path / "gpu.json"
    which = ["--engine-shapes", "qwen3-0.6b", "--engine-cases", "exactness", "soak"]
    few = ["--engine-flags", "num-gpu-blocks-override=16"]
    done = bench("--dry-run", "--sections", "engine", *which, *few, "--out", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads(out.read_text())["engine"]
    exact, soaked = found["qwen3-0.6b exactness"], found["qwen3-0.6b soak"]
    assert exact["requests"] == 30 and exact["mismatches"] == 0 and exact["preemptions"] > 0
    assert soaked["finished"] > 0 and soaked["cancelled"] > 0 and soaked["failed"] == 0


@pytest.mark.timeout(120)
def test_the_compiled_peer_can_be_warmed_alone():
    command = [sys.executable, "-m", "ops.bench.gpu.peers", "compiled", "--warm", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-1000:]
    assert json.loads(done.stdout)["compiled warmed"]["wall_s"] > 0


def test_a_token_or_a_logprob_that_differs_is_a_mismatch():
    from ops.bench.gpu.clients import Answers, Stream
    from ops.bench.gpu.engine import _compare
    from services.cli.client import Logprobs, TopLogprob

    def answer(token_id=7, logprob=-1.5, top=9):
        logprobs = [Logprobs(token_id, logprob, 1, (TopLogprob(top, -1.0, b""),))]
        return Stream(arrivals=[(1.0, 1)], token_ids=[token_id], logprobs=logprobs)

    figures = {"requests": 0, "mismatches": 0}
    streams = [answer(), answer(token_id=8), answer(logprob=-1.5000001), answer(top=10), answer(token_id=8)]
    _compare(figures, 3, [0, 0, 0, 0, -1], Answers(streams, []), [answer()])
    assert figures["requests"] == 4 and figures["mismatches"] == 3
    assert figures["first_mismatch"] == "3 at once, request 0: token 0 is 8 instead of 7"


def test_exactness_asks_a_thousand_requests_of_a_hundred_prompts():
    from ops.bench.gpu.exactness import WAVES, references, wave

    jobs = references(1000, toy=False)
    assert len(jobs) == 100 and len({job.token_ids for job in jobs}) == 100
    waves = [wave(at_once, count, jobs, 1000, toy=False) for at_once, count in WAVES.items()]
    assert sum(number >= 0 for mixed in waves for number, _ in mixed) == 900
    assert sum(number < 0 for mixed in waves for number, _ in mixed) == 180
    repeats = [(jobs[n], job) for mixed in waves for n, job in mixed if n >= 0]
    assert all(same.token_ids == job.token_ids and job.deterministic for same, job in repeats)
    assert len({job.fields.get("cache_salt", "") for _, job in repeats}) == 451, "half compute their prompts again"
    assert not any(job.deterministic for mixed in waves for n, job in mixed if n < 0)


@pytest.mark.parametrize(
    ("tokens", "leave_after", "error", "became"),
    [(5, 0, "", "finished"), (2, 2, "", "cancelled"), (2, 0, "", "failed"), (5, 0, "refused", "failed")],
)
def test_what_became_of_a_soaked_request(tokens, leave_after, error, became):
    from ops.bench.gpu.clients import Stream
    from ops.bench.gpu.soak import Soaked, count
    from ops.bench.workload import Job

    told = Soaked()
    count(told, Job((1,), 5, leave_after=leave_after), Stream(arrivals=[(1.0, tokens)], error=error))
    assert getattr(told, became) == 1 and told.finished + told.cancelled + told.failed == 1


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
