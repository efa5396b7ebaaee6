"""What the compiled bodies share: threads, exp, rounding to bfloat16."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.cpu import choice
from kernels.cpu.compiled import activation, attention, norm, vectors
from tests.kernels.closeness import assert_same

NUM_THREADS = 2
ROOT = Path(__file__).parents[2]


def test_exp_is_far_more_exact_than_bfloat16():
    numbers = np.linspace(-87, 88, 200_001).astype(np.float32)
    mine, exact = np.array([vectors.exp(each) for each in numbers[::97]]), np.exp(numbers[::97].astype(np.float64))
    assert (np.abs(mine - exact) <= 5e-6 * exact).all()
    assert math.isnan(vectors.exp(np.float32(np.nan)))
    assert vectors.exp(np.float32(-1e30)) < 1e-37


def test_silu_at_the_ends_is_what_torch_says():
    ends = torch.tensor([-3e38, -1e4, -100.0, -88.5, -20.0, 0.0, 20.0, 100.0, 3e38, float("nan"), -math.inf])
    mine = torch.tensor([vectors.silu(each) for each in ends.numpy()])
    torch.testing.assert_close(mine, torch.nn.functional.silu(ends), rtol=1e-5, atol=1e-30, equal_nan=True)


def test_narrowing_rounds_as_torch_does():
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 1], dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e38, 1e-40])
    wide = torch.cat((ties.view(torch.float32), special, torch.randn(500) * 100))
    mine = np.array([vectors.narrow(each) for each in wide.numpy()], np.uint16)
    assert (mine == wide.bfloat16().view(torch.uint16).numpy()).all()
    assert math.isnan(vectors.widen(vectors.narrow(np.float32(np.nan))))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_any_number_of_threads_does_all_of_the_work(threads, rows):
    torch.set_num_threads(threads)
    x, weight = torch.randn(rows, 4096).bfloat16(), torch.randn(4096).bfloat16()
    assert_same(norm.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5))
    gate, up = x.float().chunk(2, dim=-1)
    assert_same(activation.silu_and_mul(x), (torch.nn.functional.silu(gate) * up).bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("contexts", [[1], [5, 5, 5], [1000, 1, 1, 1], [1, 1, 2000], list(range(1, 40))])
def test_rows_are_shared_out_once_and_evenly(threads, contexts):
    torch.set_num_threads(threads)
    lengths = np.array(contexts)
    firsts = np.zeros_like(lengths)
    rows = attention.plan_rows(np.arange(len(contexts)), lengths, firsts, np.zeros((len(contexts), 125), np.int32), 4)
    costs = np.tile(lengths, 4)
    shares = [costs[begin:end].sum() for begin, end in zip(rows.borders, rows.borders[1:], strict=False)]
    assert len(shares) == threads
    assert (np.diff(rows.borders) >= 0).all()
    assert (rows.borders[0], rows.borders[-1]) == (0, len(costs))
    assert max(shares) <= costs.sum() / threads + 2 * costs.max()


def test_torch_and_the_kernels_share_their_threads():
    """One OpenMP library in the process: a second would bring threads of its own, which fight torch's for the cores."""
    code = (
        "import torch; from kernels.cpu.compiled import norm\n"
        "norm.rms_norm(torch.ones(64, 1024).bfloat16(), torch.ones(1024).bfloat16(), 1e-5)\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1", done.stderr


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    code = (
        "import time, torch; began = time.perf_counter()\n"
        "from kernels.cpu.compiled import activation, linear, norm, rope\n"
        "from kernels.cpu.compiled.attention import _decode_kernel; _decode_kernel(4, 64, 16)\n"
        "print(time.perf_counter() - began)"
    )
    environ = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": ""}
    run = [sys.executable, "-c", code]
    first, second = (
        float(subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environ, check=True).stdout)
        for _ in range(2)
    )
    assert second < first / 3, (first, second)


def test_without_a_folder_to_write_to_every_process_compiles_for_itself(tmp_path):
    code = (
        "import numba.core.caching as caching, torch\n"
        "caching.CodeLibraryCacheImpl._locator_classes = []\n"
        "from kernels.ops import norm\n"
        "x = torch.ones(2, 8).bfloat16(); print(norm.rms_norm(x, x[0], 1e-5).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "16.0", done.stderr


def test_without_numba_torch_takes_their_place():
    code = (
        "import sys; sys.modules['numba'] = None; import torch\n"
        "from kernels.ops import norm; from kernels.cpu import choice\n"
        "x = torch.ones(2, 8).bfloat16(); norm.rms_norm(x, x[0], 1e-5); print(choice.why_not_compiled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "numba" in done.stdout, done.stderr
    assert choice.why_not_compiled() == ""


@pytest.mark.parametrize(
    "limit", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=2", "OMP_DYNAMIC=true", "OMP_MAX_ACTIVE_LEVELS=0"]
)
def test_all_of_the_work_is_done_by_however_many_threads_openmp_grants(limit):
    code = (
        "import torch; torch.set_num_threads(4)\n"
        "from kernels.ops import activation, linear, norm\n"
        "x, weight = torch.randn(64, 4096).bfloat16(), torch.randn(4096).bfloat16()\n"
        "close = lambda a, b: torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)\n"
        "assert close(norm.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5))\n"
        "gate, up = x.float().chunk(2, -1)\n"
        "assert close(activation.silu_and_mul(x), torch.nn.functional.silu(gate) * up)\n"
        "w = (torch.randn(512, 4096) / 64).bfloat16(); packed = linear.pack_linear(w, by_rows=True)\n"
        "assert close(linear.linear(x[:1], packed), x[:1].float() @ w.float().T)\n"
        "from tests.kernels.pages import Cache, Chunk, Heads, draw\n"
        "rows = [draw(Heads(), 40, torch.bfloat16, i) for i in range(9)]; cache = Cache(Heads(), rows)\n"
        "from kernels.cpu import attention; from kernels.reference import attention as spec\n"
        "cache.step([Chunk(i, 0, 39) for i in range(9)], body=attention)\n"
        "step = [Chunk(i, 39, 40) for i in range(9)]\n"
        "for a, b in zip(cache.step(step, body=attention), cache.step(step, body=spec)): assert close(a, b)\n"
        "print('right')"
    )
    name, _, value = limit.partition("=")
    environ = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.stdout.strip() == "right", done.stderr


def test_machine_code_is_kept_apart_for_every_version_of_the_sources(tmp_path):
    """numba looks only at the file that a kernel stands in; exp and its like are inlined from another."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import torch; from kernels.cpu.compiled import activation\n"
        "print(activation.silu_and_mul(torch.ones(1, 2).bfloat16()).item())"
    )
    environ = {"PATH": "", "PYTHONPATH": str(tmp_path)}

    def run():
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=True).stdout

    before = run()
    vectors = tmp_path / "kernels" / "cpu" / "compiled" / "vectors.py"
    vectors.write_text(vectors.read_text().replace("np.float32(0.6931471805599453)", "np.float32(0.3)"))
    assert run() != before
