"""What is compiled ahead is what a launch then looks up, and what is not is counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")

SAME_KEYS = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature
from kernels.fused import activation, declared, launch

backend, asked = make_backend(GPUTarget("cuda", 90, 32)), []
form_of = launch._form

def noted(kernel, arguments, constants, *options):
    form = form_of(kernel, arguments, constants, *options)
    asked.append((form, {**arguments, **constants}))
    return form

launch._form = noted
shape = declared.ModelShape("toy", 64, 4, 2, 16, 96, 256, qk_norm=True, windows=(32, 48))
forms = declared.forms_of(shape)
with launch.recorded():  # a vector that begins in the middle of a line of 16 bytes
    activation.silu_and_mul(torch.zeros(2 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 64))
keys = set()
for form, arguments in asked:
    binder = create_function_from_signature(form.kernel.signature, form.kernel.params, backend)
    options = form.options
    launched = compute_cache_key({}, *binder(**arguments, **options, debug=False)[1:])
    warmed = compute_cache_key({}, *binder(*launch.stand_ins(form), **options, debug=False)[1:])
    assert launched == warmed, (form.name, launched, warmed)
    keys.add((form.name, launched))
assert len(forms) > 40, len(forms)
assert not {name for name in asked[-1][0].aligned} >= {"x"}, asked[-1][0]
print(len(asked), len(keys), len(set(form for form, _ in asked)))
assert len(keys) == len(set(form for form, _ in asked)), "a form is one key"
"""


def test_a_form_is_warmed_under_the_very_key_that_its_launch_looks_up():
    """In a process of its own, for interpreted kernels have no keys; a binder needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SAME_KEYS],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


class Told:
    name = "_some_kernel"


def test_compilations_after_the_seal_are_counted_and_the_first_of_each_kernel_is_logged(monkeypatch, caplog):
    import triton

    from kernels.fused.launch import LateCompilations

    runtime, heard = triton.knobs.runtime, []
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda **facts: heard.append(facts["key"]))
    late = LateCompilations()
    runtime.jit_post_compile_hook(fn=Told, key="early", repr="early", is_manual_warmup=False)
    late.seal()
    late.seal()
    for key, warmup in (("a", False), ("b", False), ("c", True)):
        runtime.jit_post_compile_hook(fn=Told, key=key, repr=f"form {key}", is_manual_warmup=warmup)
    assert late.total == 2
    assert dict(late.by_kernel) == {"_some_kernel": 2}
    assert [record.getMessage() for record in caplog.records] == ["compiled _some_kernel in live traffic: form a"]
    assert heard == ["early", "a", "b", "c"]
