"""A kernel that was started before is started again without asking Triton, with the very same parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")

STARTED_TWICE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import triton.compiler.compiler as compiler

loaded, started, asked = [], [], []

class Utils:
    def load_binary(self, name, *rest):
        loaded.append(name)
        return (1, len(loaded), 32, 0, 1024)

class Driver:  # a GPU that takes everything and does nothing
    utils = Utils()
    def launcher_cls(self, source, metadata):
        def start(*told):
            started.append((told[:3], told[4], [getattr(each, "data_ptr", lambda: each)() for each in told[9:]]))
        return start
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
compiler.max_shared_mem = lambda device: 232448
from kernels.fused import activation, launch, norm

run = triton.JITFunction.run
def noted(self, *arguments, **more):
    asked.append(self.fn.__name__)
    return run(self, *arguments, **more)
triton.JITFunction.run = noted

x, weight = torch.zeros(6, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
outs = [torch.zeros_like(x) for _ in range(9)]
torch.empty, torch.empty_like = (lambda *a, **k: outs[0]), (lambda *a, **k: outs[1])

def same(call):
    call()
    first, count = started[-1], len(asked)
    call()
    assert started[-1] == first, (first, started[-1])
    assert len(asked) == count, "the second start asked Triton"

same(lambda: norm.add_rms_norm(x, x, weight, 1e-5))
same(lambda: norm.add_rms_norm(x[:2], x[2:4], weight, 1e-5))
assert asked == ["_norm_kernel"], asked  # other addresses and another number of rows are the same form
same(lambda: norm.rms_norm(x, weight, 1e-5))
odd = torch.zeros(65, dtype=torch.bfloat16)[1:]
same(lambda: norm.rms_norm(x, odd, 1e-5))
same(lambda: norm.rms_norm(x, weight, 1e-5, plus_one=True))
wide, wide_weight = x.float(), weight.float()
same(lambda: norm.rms_norm(wide, wide_weight, 1e-5))
assert len(asked) == 5 == len(loaded), (asked, loaded)  # absent, unaligned, constant, dtype
same(lambda: activation.silu_and_mul(x))
assert started[-1][0] == (6, 1, 1) and len({function for _, function, _ in started}) == 6
"""


def test_a_second_start_is_the_first_one_again():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", STARTED_TWICE],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_number_beyond_32_bits_is_refused_before_it_is_cut():
    from kernels.fused.launch import _type_of

    assert _type_of(2**31 - 1) == "i32"
    with pytest.raises(ValueError, match="32 bits"):
        _type_of(2**31)
