"""Every declared form of the fused kernels compiles without a GPU, fits a multiprocessor and hardly spills."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.counts import count

pytest.importorskip("triton", reason="triton is published for Linux only")

from kernels.fused.declared import SHAPES, forms_of

TARGETS = (90, 80, 100, 89, 120)
SAME_ROUNDINGS = """
import re
from collections import Counter
from kernels.fused import attention, declared, prove

shapes = [shape for shape in declared.SHAPES if shape.soft_cap or shape.alibi]
assert len(shapes) > 1
for shape in shapes:
    for form in prove.forms_on(shape, 90):
        constants = dict(form.constants)
        exact = {attention.EXACT_PROMPT.rows, attention.WIDE_EXACT_PROMPT.rows}
        if form.name != "_prefill_kernel" or constants["window"] or constants["rows"] not in exact:
            continue
        blocks = re.split(r"^\\$L__BB", prove._compile(form, 90).asm["ptx"], flags=re.M)
        loops = [block for block in blocks if block.count("ex2.approx") > 8]
        asked = [Counter(re.findall(r"\\b(fma|mul|add|sub|div)\\S*\\.f32", loop)) for loop in loops]
        assert len(asked) == 2 and asked[0] == asked[1], (shape.name, asked)
        print(shape.name, asked)
"""
FIRST_MODELS = ("Llama-3.1-8B", "gpt-oss-20b", "Qwen3-30B-A3B")
"""The quick tier takes the first target, and these models: between them they need every kernel."""


def prove(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: where kernels are interpreted none can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.fused.prove", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.mark.timeout(1800)
def test_every_form_compiles_and_spills_no_more_than_is_tolerated(tmp_path):
    targets = [str(target) for target in TARGETS[: count("compile_targets")]]
    report = tmp_path / "report.json"
    others = [shape.name for shape in SHAPES if shape.name not in FIRST_MODELS]
    models = [*FIRST_MODELS, *others][: count("compile_models")]
    done = prove("--target", *targets, "--model", *models, "--json", str(report))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    forms = json.loads(report.read_text())
    everything = {form.name for shape in SHAPES for form in forms_of(shape)}
    assert {form["kernel"] for form in forms} == everything
    assert all(form["registers"] > 0 and form["error"] == "" for form in forms)


@pytest.mark.timeout(600)
def test_a_tile_of_an_exact_prompt_has_the_same_roundings_masked_and_unmasked():
    """Which loop walks over a tile depends on how a prompt was cut. In a process of its own, as above."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SAME_ROUNDINGS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "Gemma-2-9B" in done.stdout and "MPT-7B" in done.stdout


@pytest.mark.parametrize(
    ("report", "problem"),
    [({"spilled_bytes": 12}, "spills 12 bytes"), ({"shared_bytes": 300_000}, "shared memory"), ({"error": "no"}, "no")],
    ids=["spill", "shared", "error"],
)
def test_what_counts_as_a_problem(report, problem):
    from kernels.fused.prove import Report

    assert Report("m", "k", 90, {}, 4, 1).problem == ""
    assert problem in Report("m", "k", 90, {}, 4, 1, **report).problem
    large = Report("m", "_prefill_kernel", 90, {"rows": "256"}, 8, 3, spilled_bytes=192)
    assert large.problem == ""
    assert "spills" in replace(large, spilled_bytes=200).problem
    assert "spills" in replace(large, constants={"rows": "128"}).problem
    wide = Report("m", "k", 90, {}, 4, 1, spilled_bytes=64, float32=True)
    assert wide.problem == ""
    assert "spills" in replace(wide, spilled_bytes=72).problem


def test_models_of_every_dtype_are_proven():
    assert {shape.dtype for shape in SHAPES} == {torch.bfloat16, torch.float16, torch.float32}
