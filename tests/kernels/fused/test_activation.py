"""Activations against their specification."""

import pytest
import torch
import torch.nn.functional as F

from kernels.cpu import activation as cpu
from kernels.fused import activation
from kernels.reference import activation as spec
from tests.kernels.closeness import assert_same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KINDS = pytest.mark.parametrize("kind", activation.KINDS)
SHAPES = [(1, 64), (3, 202), (2, 3, 24), (40,), (2, 2), (2, 2050), (2, 4096), (3, 6144)]
TORCHS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def draw(*shape, dtype, device):
    return (torch.randn(*shape, device=device) * 2).to(dtype)


@DTYPES
@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_and_plain(dtype, kind, shape, device):
    x = draw(*shape, dtype=dtype, device=device)
    before = x.clone()
    if shape[-1] > 2 or "relu" not in kind:  # of so few none may be above zero
        assert_same(activation.activate_and_mul(x, kind), spec.activate_and_mul(x, kind))
    assert_same(activation.activate(x, kind), spec.activate(x, kind))
    assert torch.equal(x, before)


@DTYPES
def test_the_usual_gate_has_a_name(dtype, device):
    x = draw(5, 130, dtype=dtype, device=device)
    assert torch.equal(activation.silu_and_mul(x), activation.activate_and_mul(x, "silu"))
    assert_same(activation.silu_and_mul(x), spec.silu_and_mul(x))


@KINDS
def test_the_specification_is_what_torch_means(kind):
    x = torch.randn(30, 50) * 4
    assert_same(spec.activate(x, kind), TORCHS[kind](x))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, of the interpreter: e^200 is infinite, as on a GPU
@KINDS
def test_the_far_ends(kind, device):
    ends = torch.tensor([-1e4, -200.0, -89.0, -88.0, -20.0, -0.0, 0.0, 20.0, 89.0, 200.0, 1e4], device=device)
    assert torch.allclose(activation.activate(ends, kind), spec.activate(ends, kind), rtol=1e-6, atol=1e-30)
    beyond = torch.tensor([float("nan"), float("inf")], device=device)
    assert torch.equal(activation.activate(beyond, kind).isnan(), torch.tensor([True, False], device=device))


@DTYPES
def test_views(dtype, device):
    wide = draw(6, 4, 48, dtype=dtype, device=device)
    for view in (wide[:, 1], wide[::2, 2, :24], wide[:, 1:3, 8:32], wide[:0], wide.transpose(0, 1)):
        if view.numel():
            assert_same(activation.activate_and_mul(view, "gelu"), spec.activate_and_mul(view, "gelu"))
            assert_same(activation.activate(view, "gelu"), spec.activate(view, "gelu"))
        else:
            assert activation.activate_and_mul(view, "gelu").shape == (0, 4, 24)
            assert activation.activate(view, "gelu").shape == (0, 4, 48)


@pytest.mark.parametrize("width", [24, 1025, 2048])
def test_every_element_is_written_and_nothing_beside(width, device, monkeypatch):
    guarded = torch.full((3 * width + 128,), 7.0, device=device)
    x = draw(3, 2 * width, dtype=torch.float32, device=device)
    monkeypatch.setattr(activation.torch, "empty", lambda *_, **__: guarded[64:-64].view(3, width))
    guarded[64:-64] = float("nan")
    assert_same(activation.silu_and_mul(x), spec.silu_and_mul(x))
    assert bool((guarded[:64] == 7).all())
    assert bool((guarded[-64:] == 7).all())


@KINDS
def test_an_elements_bits_do_not_depend_on_its_place(kind, device):
    x = draw(7, 100, dtype=torch.float32, device=device)
    whole = activation.activate(x, kind)
    assert torch.equal(activation.activate(x[3:4, 9:90], kind), whole[3:4, 9:90])


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.ones(2, 7), "silu"),
        (torch.ones(2, 0), "silu"),
        (torch.ones(()), "silu"),
        (torch.ones(8, 2).T, "silu"),
        (torch.ones(2, 8), "swish"),
    ],
    ids=["odd", "no width", "no dimension", "strided", "unknown"],
)
def test_what_does_not_fit_is_refused(x, kind):
    with pytest.raises(ValueError, match=r"must be|is none of"):
        activation.activate_and_mul(x, kind)


@DTYPES
@KINDS
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_the_cpu_bodies(dtype, kind, exact):
    x = draw(9, 66, dtype=dtype, device="cpu")
    assert_same(cpu.activate_and_mul(x, kind, exact=exact), spec.activate_and_mul(x, kind))
    assert_same(cpu.activate(x, kind, exact=exact), spec.activate(x, kind))
