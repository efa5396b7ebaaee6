"""Routing and mixture-of-experts layers: the fused and the CPU's bodies against the specification."""

import pytest
import torch

from kernels.cpu import experts as cpu
from kernels.fused import experts as fused
from kernels.reference import experts as spec
from tests.kernels.closeness import assert_same

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["fused", "cpu"])
def body(request, device):
    if request.param == "cpu" and device != "cpu":
        pytest.skip("a body of the CPU")
    return {"fused": fused, "cpu": cpu}[request.param]


@pytest.fixture
def small_tiles(monkeypatch):
    """Products of several steps and several tiles, at sizes that an interpreter can do."""
    for name, rows in (("FEW", 4), ("SOME", 8), ("MANY", 16)):
        for prefix in ("", "WIDE_"):
            monkeypatch.setattr(fused, prefix + name, fused.Tile(rows, 16, 16, 4, 2))
    monkeypatch.setattr(fused, "SORTED_AT_ONCE", 64)


# Routing


def route_both(logits, top_k, **options):
    ours, theirs = fused.route(logits, top_k, **options), spec.route(logits, top_k, **options)
    assert torch.equal(ours[1], theirs[1])
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=1e-30, equal_nan=True)
    return ours


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8), (7, 7)])
def test_routes(experts, top_k, renormalize, scoring, device):
    logits = torch.randn(21, experts, device=device) * 3
    weights, _ = route_both(logits, top_k, scoring=scoring, renormalize=renormalize)
    if renormalize:
        torch.testing.assert_close(weights.sum(-1), torch.ones(21, device=device))
    route_both(logits.bfloat16(), top_k, scoring=scoring, renormalize=renormalize)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN and of inf - inf
def test_equal_infinite_and_broken_logits(device):
    logits = torch.randn(7, 12, device=device)
    logits[0] = 1.0
    logits[1] = torch.tensor([0.0, -0.0] * 6)
    logits[2, 3:] = -torch.inf
    logits[3] = -torch.inf
    logits[4] = 200.0 * logits[4].sign()
    logits[5, 4] = torch.nan
    logits[6] = torch.nan
    for scoring in ("softmax", "sigmoid"):
        weights, ids = route_both(logits, 5, scoring=scoring, renormalize=True)
        assert ids[:2].tolist() == [[0, 1, 2, 3, 4]] * 2
        assert ids[[3, 6]].tolist() == [[0, 1, 2, 3, 4]] * 2
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert torch.isfinite(weights[:3]).all()


def test_a_token_is_routed_alike_alone_and_among_others(device):
    logits = torch.randn(50, 64, device=device)
    together = fused.route(logits, 4, renormalize=True)
    for start, end in ((0, 1), (7, 8), (3, 40)):
        alone = fused.route(logits[start:end], 4, renormalize=True)
        assert torch.equal(alone[0], together[0][start:end])
        assert torch.equal(alone[1], together[1][start:end])


def test_no_token_is_routed(device):
    assert [each.shape for each in fused.route(torch.empty(0, 8, device=device), 2, renormalize=True)] == [(0, 2)] * 2


# Sorting


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (9, 5, 3), (100, 12, 4), (40, 130, 8)])
def test_assignments_are_sorted_and_every_one_is_in_one_tile(tokens, experts, top_k, small_tiles, device):
    ids = torch.rand(tokens, experts, device=device).argsort(-1)[:, :top_k].int().contiguous()
    ids %= experts - 1  # one expert has no token
    tile = fused.SOME
    work = fused._sort(ids, experts, tile)
    assert work.order.tolist() == ids.flatten().argsort(stable=True).tolist()
    num_tiles = int(work.num_tiles)
    assert num_tiles <= len(work.tile_experts)
    seen = []
    for expert, start, end in zip(work.tile_experts, work.tile_starts, work.tile_ends, strict=True):
        if len(seen) == tokens * top_k:
            break
        places = list(range(int(start), min(int(start) + tile.rows, int(end))))
        assert places
        assert ids.flatten()[work.order[places].long()].eq(expert).all()
        seen += places
    assert seen == list(range(tokens * top_k))


# The layer


def layer(tokens, hidden, width, experts, top_k, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    x, gate_up, down = randn(tokens, hidden), randn(experts, 2 * width, hidden), randn(experts, hidden, width)
    logits = torch.randn(tokens, experts, generator=generator).to(device)
    return x, gate_up * hidden**-0.5, down * width**-0.5, *spec.route(logits, top_k, renormalize=True)


SHAPES = [(1, 32, 16, 8, 2), (13, 48, 40, 5, 2), (40, 33, 21, 6, 3), (30, 64, 24, 17, 1), (5, 16, 16, 3, 3)]
"""(tokens, hidden, width, experts, top_k)"""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers(shape, exact, dtype, body, small_tiles, device):
    x, gate_up, down, weights, ids = layer(*shape, dtype, device)
    got = body.experts(x, body.pack_experts(gate_up, down), weights, ids, exact=exact)
    expected = spec.experts(x, spec.pack_experts(gate_up, down), weights, ids)
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("clamp", [0.0, 0.7], ids=["swiglu", "clamped"])
def test_layers_with_biases_and_a_clamped_gate(clamp, exact, dtype, body, small_tiles, device):
    x, gate_up, down, weights, ids = layer(13, 48, 40, 5, 2, dtype, device)
    biases = {"gate_up_bias": torch.randn(5, 80), "down_bias": torch.randn(5, 48)}
    options = {name: bias.to(dtype).to(device) for name, bias in biases.items()} | {"clamp": clamp}
    got = body.experts(x, body.pack_experts(gate_up, down, **options), weights, ids, exact=exact)
    expected = spec.experts(x, spec.pack_experts(gate_up, down, **options), weights, ids)
    assert_same(got, expected)
    alone = body.experts(x[4:5], body.pack_experts(gate_up, down, **options), weights[4:5], ids[4:5], exact=exact)
    assert not exact or torch.equal(alone, got[4:5])
    plain = spec.experts(x, spec.pack_experts(gate_up, down), weights, ids)
    with pytest.raises(AssertionError):
        assert_same(got, plain)


def test_a_layer_in_its_real_tiles(device):
    x, gate_up, down, weights, ids = layer(20, 160, 96, 4, 2, torch.bfloat16, device)
    got = fused.experts(x, fused.pack_experts(gate_up, down), weights, ids)
    assert_same(got, spec.experts(x, spec.pack_experts(gate_up, down), weights, ids))


def test_the_comparison_tells_a_wrong_order_of_weights(small_tiles, device):
    x, gate_up, down, weights, ids = layer(13, 48, 40, 5, 2, torch.float32, device)
    expected = spec.experts(x, spec.pack_experts(gate_up, down), weights, ids)
    with pytest.raises(AssertionError):
        assert_same(fused.experts(x, fused.pack_experts(gate_up, down), weights.flip(1).contiguous(), ids), expected)


def test_all_tokens_choose_one_expert_and_none_the_others(body, small_tiles, device):
    x, gate_up, down, weights, ids = layer(37, 32, 16, 6, 1, torch.float32, device)
    ids.fill_(4)
    got = body.experts(x, body.pack_experts(gate_up, down), weights, ids)
    assert_same(got, spec.experts(x, spec.pack_experts(gate_up, down), weights, ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exact_token_has_the_same_bits_alone_and_among_others(dtype, body, small_tiles, device):
    x, gate_up, down, weights, ids = layer(60, 48, 40, 6, 2, dtype, device)
    packed = body.pack_experts(gate_up, down)
    together = body.experts(x, packed, weights, ids, exact=True)
    for start, end in ((0, 1), (9, 10), (20, 37), (1, 60)):
        part = slice(start, end)
        assert torch.equal(body.experts(x[part], packed, weights[part], ids[part], exact=True), together[part])


def test_a_broken_token_spares_the_others(body, small_tiles, device):
    x, gate_up, down, weights, ids = layer(20, 32, 16, 4, 2, torch.float32, device)
    packed = body.pack_experts(gate_up, down)
    healthy = body.experts(x, packed, weights, ids, exact=True)
    x[7] = torch.nan
    broken = body.experts(x, packed, weights, ids, exact=True)
    others = torch.arange(20, device=device) != 7
    assert torch.equal(broken[others], healthy[others])
    assert broken[7].isnan().all()


def test_no_tokens(body, device):
    x, gate_up, down, weights, ids = layer(0, 32, 16, 4, 2, torch.float32, device)
    assert body.experts(x, body.pack_experts(gate_up, down), weights, ids).shape == (0, 32)


def test_what_does_not_fit_is_refused(device):
    x, gate_up, down, weights, ids = layer(4, 32, 16, 4, 2, torch.float32, device)
    packed = fused.pack_experts(gate_up, down)
    with pytest.raises(ValueError, match="gate_up is"):
        fused.pack_experts(gate_up[:, :20], down)
    with pytest.raises(ValueError, match="down_bias must be"):
        fused.pack_experts(gate_up, down, down_bias=torch.zeros(4, 16, device=device))
    with pytest.raises(ValueError, match="x must be"):
        fused.experts(x.bfloat16(), packed, weights, ids)
    with pytest.raises(ValueError, match="x must be"):
        fused.experts(x[:, :16].contiguous(), packed, weights, ids)
    with pytest.raises(ValueError, match="expert_ids must be"):
        fused.experts(x, packed, weights, ids.long())
    with pytest.raises(ValueError, match="weights must be"):
        fused.experts(x, packed, weights[:2], ids[:2])
    with pytest.raises(ValueError, match="top_k is 9"):
        fused.route(x[:, :4], 9, renormalize=True)
    with pytest.raises(ValueError, match="softmax or sigmoid"):
        fused.route(x, 2, scoring="tanh", renormalize=True)
