"""RMSNorm and LayerNorm against their specification."""

import pytest
import torch

from kernels.cpu import norm as cpu
from kernels.fused import norm
from kernels.reference import norm as spec
from tests.kernels.closeness import assert_same

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = [(1, 64), (3, 64), (17, 200), (5, 3, 24), (2, 3, 2, 8), (40,), (2, 1), (33, 128), (2, 1025)]


def draw(*shape, dtype, device):
    return torch.randn(*shape, device=device).to(dtype)


def variants(width, dtype, device):
    """(name of the function, its arguments between x and eps, its flags)."""
    weight, bias = draw(2, width, dtype=dtype, device=device)
    small = (weight.float() * 0.01).to(dtype)
    return [
        ("rms_norm", (weight,), {}),
        ("rms_norm", (small,), {"plus_one": True}),
        ("layer_norm", (weight, bias), {}),
        ("layer_norm", (weight, None), {}),
        ("layer_norm", (None, None), {}),
    ]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_and_behind_an_addition(dtype, shape, device):
    x, other = draw(2, *shape, dtype=dtype, device=device)
    for name, weights, flags in variants(shape[-1], dtype, device):
        if name == "layer_norm" and shape[-1] == 1:
            continue  # of one element nothing is left
        x_before, other_before = x.clone(), other.clone()
        assert_same(getattr(norm, name)(x, *weights, 1e-5, **flags), getattr(spec, name)(x, *weights, 1e-5, **flags))
        normed, total = getattr(norm, f"add_{name}")(x, other, *weights, 1e-5, **flags)
        expected, expected_total = getattr(spec, f"add_{name}")(x, other, *weights, 1e-5, **flags)
        assert_same(normed, expected)
        assert torch.equal(total, expected_total)
        assert torch.equal(x, x_before)
        assert torch.equal(other, other_before)


@DTYPES
def test_heads_of_a_wider_projection_are_read_where_they_lie(dtype, device):
    projected, weight = draw(5, 7, 24, dtype=dtype, device=device), draw(24, dtype=dtype, device=device)
    for view in (projected[:, :4], projected[:, 4:6], projected[:, 2], projected[1::2], projected[:1, 3:]):
        assert_same(norm.rms_norm(view, weight, 1e-6), spec.rms_norm(view, weight, 1e-6))
        residual = draw(*view.shape[:-1], 48, dtype=dtype, device=device)[..., 24:]
        expected = spec.add_layer_norm(view, residual, weight, None, 1e-6)
        for mine, theirs in zip(norm.add_layer_norm(view, residual, weight, None, 1e-6), expected, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("width", [24, 300, 1000])
def test_a_rows_bits_do_not_depend_on_the_rows_beside(width, device):
    x, weight = draw(40, width, dtype=torch.bfloat16, device=device), draw(width, dtype=torch.bfloat16, device=device)
    whole, centred = norm.rms_norm(x, weight, 1e-5), norm.layer_norm(x, weight, weight, 1e-5)
    for start, end in ((0, 1), (7, 8), (3, 20), (39, 40)):
        assert torch.equal(norm.rms_norm(x[start:end], weight, 1e-5), whole[start:end])
        assert torch.equal(norm.layer_norm(x[start:end], weight, weight, 1e-5), centred[start:end])


@pytest.mark.parametrize("width", [24, 200, 1025])
def test_every_element_is_written_and_nothing_beside(width, device, monkeypatch):
    guarded = torch.full((5 * width + 128,), 7.0, device=device)
    monkeypatch.setattr(norm.torch, "empty", lambda *_, **__: guarded[64 : 64 + 5 * width].view(5, width))
    x, weight = draw(5, width, dtype=torch.float32, device=device), draw(width, dtype=torch.float32, device=device)
    guarded[64:-64] = float("nan")
    assert_same(norm.rms_norm(x, weight, 1e-5), spec.rms_norm(x, weight, 1e-5))
    assert bool((guarded[:64] == 7).all())
    assert bool((guarded[-64:] == 7).all())


def test_values_whose_mean_is_large(device):
    x = torch.randn(3, 256, device=device) + 1000
    assert (norm.layer_norm(x, None, None, 1e-5) - spec.layer_norm(x, None, None, 1e-5)).abs().max() < 1e-3


def test_no_rows(device):
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert norm.rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert norm.layer_norm(x, weight, weight, 1e-5).shape == (0, 64)
    assert [each.shape for each in norm.add_rms_norm(x, x, weight, 1e-5)] == [(0, 64)] * 2


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [
        (torch.ones(2, 8), None, torch.ones(7)),
        (torch.ones(2, 8), None, torch.ones(16)[::2]),
        (torch.ones(8, 2).T, None, torch.ones(8)),
        (torch.ones(2, 8), torch.ones(1, 8), torch.ones(8)),
        (torch.ones(2, 8), torch.ones(2, 8, dtype=torch.float16), torch.ones(8)),
        (torch.ones(2, 0), None, torch.ones(0)),
    ],
    ids=["width", "strided weight", "strided x", "residual's shape", "residual's dtype", "no width"],
)
def test_what_does_not_fit_is_refused(x, residual, weight):
    with pytest.raises(ValueError, match=r"must be|residual is|must have"):
        norm.rms_norm(x, weight, 1e-5) if residual is None else norm.add_rms_norm(x, residual, weight, 1e-5)


@DTYPES
def test_the_cpu_bodies(dtype):
    x, other = draw(2, 9, 33, dtype=dtype, device="cpu")
    for name, weights, flags in variants(33, dtype, "cpu"):
        assert_same(getattr(cpu, name)(x, *weights, 1e-5, **flags), getattr(spec, name)(x, *weights, 1e-5, **flags))
        actual = getattr(cpu, f"add_{name}")(x, other, *weights, 1e-5, **flags)
        for mine, theirs in zip(actual, getattr(spec, f"add_{name}")(x, other, *weights, 1e-5, **flags), strict=True):
            assert_same(mine, theirs)
