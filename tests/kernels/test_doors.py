"""The public door hands a tensor to the body of its device, and needs no Triton for those of a CPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.ops import activation, blocks, choice, norm, rope

X, WEIGHT = torch.randn(3, 8), torch.ones(8)
IDS = torch.tensor([1, 0])


def pool():
    return torch.arange(4 * 1 * 2 * 1 * 2 * 8, dtype=torch.float32).view(4, 1, 2, 1, 2, 8)


CALLS = [
    (norm, "rms_norm", lambda: norm.rms_norm(X, WEIGHT, 1e-5)),
    (norm, "add_rms_norm", lambda: norm.add_rms_norm(X, X, WEIGHT, 1e-5)[1]),
    (norm, "layer_norm", lambda: norm.layer_norm(X, WEIGHT, WEIGHT, 1e-5)),
    (norm, "add_layer_norm", lambda: norm.add_layer_norm(X, X, None, None, 1e-5)[0]),
    (activation, "silu_and_mul", lambda: activation.silu_and_mul(X)),
    (activation, "activate_and_mul", lambda: activation.activate_and_mul(X, "gelu")),
    (activation, "activate", lambda: activation.activate(X, "relu_squared")),
    (rope, "rope_and_write_kv", lambda: rope.rope_and_write_kv(X.view(1, 3, 8), pool(), 0, IDS[:1])),
    (blocks, "copy_blocks", lambda: blocks.copy_blocks(pool(), IDS[:1], IDS[1:])),
    (blocks, "gather_blocks", lambda: blocks.gather_blocks(pool(), IDS)),
    (blocks, "scatter_blocks", lambda: blocks.scatter_blocks(pool()[:2], pool(), IDS)),
]


@pytest.mark.parametrize(("door", "name", "call"), CALLS, ids=[name for _, name, _ in CALLS])
def test_what_lies_on_a_gpu_goes_to_the_fused_body(door, name, call, monkeypatch):
    pytest.importorskip("triton", reason="triton is published for Linux only")
    if torch.cuda.is_available():
        pytest.skip("interpreted where there is no GPU")
    expected = call()
    fused = pytest.importorskip(f"kernels.fused.{door.__name__.rpartition('.')[2]}")
    body, calls = getattr(fused, name), []
    monkeypatch.setattr(choice, "is_fused", lambda tensor: True)
    monkeypatch.setattr(fused, name, lambda *given, **named: calls.append(name) or body(*given, **named))
    actual = call()
    assert calls == [name]
    if expected is not None:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_the_device_decides(device, fused):
    assert choice.is_fused(SimpleNamespace(device=torch.device(device))) is fused


def test_a_cpu_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from kernels.ops import activation, blocks, norm, rope\n"
        "x = torch.ones(2, 8); norm.layer_norm(x, None, None, 1e-5); activation.silu_and_mul(x)\n"
        "blocks.gather_blocks(x, torch.tensor([1]))\n"
        "rope.rope_and_write_kv(x.view(1, 2, 8), torch.ones(2, 1, 2, 1, 2, 8), 0, torch.tensor([0]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
