"""Paged attention under the interpreter: mixed steps as the scheduler makes them, against the specification."""

import pytest
import torch

from kernels.fused import attention
from kernels.reference import attention as spec
from tests.kernels.closeness import assert_same
from tests.kernels.pages import Cache, Chunk, Heads, draw

DTYPES = [torch.float32, torch.bfloat16]
HEADS = {
    "gqa": Heads(),
    "mha": Heads(num_heads=2, num_kv_heads=2, head_dim=10, block_size=8),
    "mqa": Heads(num_heads=7, num_kv_heads=1, head_dim=64, block_size=32),
}
LENGTHS = [1, 16, 17, 40, 100, 300, 530]
BEFORE = [Chunk(2, 0, 16), Chunk(3, 0, 39), Chunk(4, 0, 60), Chunk(5, 0, 299), Chunk(6, 0, 529)]
MIXED = [
    Chunk(5, 299, 300),
    Chunk(0, 0, 1),
    Chunk(4, 60, 100),
    Chunk(2, 16, 17),
    Chunk(1, 0, 16),
    Chunk(3, 39, 40),
    Chunk(6, 529, 530),
]


def fill(cache: Cache, heads: Heads) -> None:
    """K and V of all but the last step, written without attending."""
    cache.step(BEFORE, body=WriteOnly)


class WriteOnly:
    plan_attention = staticmethod(spec.plan_attention)
    write_kv = staticmethod(spec.write_kv)

    @staticmethod
    def paged_attention(q, *_, **__):
        return q


class Fused:
    """The fused body with the specification's writing, which is another kernel's business."""

    def __init__(self, **scoring):
        self.scoring = scoring

    def plan_attention(self, *args, **kwargs):
        self.plan = spec.plan_attention(*args, **kwargs)
        return attention.plan_attention(*args, **kwargs)

    def write_kv(self, kv, pool, layer_id, _):
        spec.write_kv(kv, pool, layer_id, self.plan)

    def paged_attention(self, q, pool, layer_id, plan, scale):
        return attention.paged_attention(q, pool, layer_id, plan, scale, **self.scoring)


class Spec(WriteOnly):
    def __init__(self, **scoring):
        self.scoring = scoring

    def paged_attention(self, *args):
        return spec.paged_attention(*args, **self.scoring)


def compare(heads, dtype, *, window=None, exact=False, **scoring):
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(LENGTHS)]
    fast, slow = Cache(heads, sequences), Cache(heads, sequences)
    for cache in (fast, slow):
        fill(cache, heads)
    actual = fast.step(MIXED, body=Fused(**scoring), window=window, exact=exact)
    expected = slow.step(MIXED, body=Spec(**scoring), window=window)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("name", HEADS)
def test_a_mixed_step(name, exact, dtype):
    compare(HEADS[name], dtype, exact=exact)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("window", [1, 21, 256, 400])
def test_a_sliding_window(window, exact):
    compare(Heads(), torch.float32, window=window, exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_of_scoring_at_once(dtype):
    torch.manual_seed(1)
    compare(Heads(), dtype, window=90, soft_cap=2.0, alibi_slopes=torch.rand(4), sinks=torch.randn(4))


@pytest.mark.parametrize(
    "scoring",
    [{"soft_cap": 1.5}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}, {"sinks": torch.arange(4.0)}],
    ids=lambda scoring: next(iter(scoring)),
)
def test_each_way_of_scoring_alone(scoring):
    compare(Heads(), torch.float32, **scoring)
