"""The tiled reference with its online softmax gives what the naive one does, on odd shapes and tiles."""

import pytest
import torch

from kernels.reference import attention as spec
from tests.kernels.closeness import assert_same
from tests.kernels.pages import Cache, Chunk, Heads, draw

LENGTHS = [1, 7, 33, 61]
STEP = [Chunk(1, 0, 7), Chunk(3, 13, 61), Chunk(0, 0, 1), Chunk(2, 32, 33)]
SCORINGS = {
    "plain": {},
    "capped": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1])},
    "sinks": {"sinks": torch.tensor([4.0, -3.0, 0.0])},
}


class Flash:
    """The tiled form with given tiles."""

    plan_attention, write_kv = staticmethod(spec.plan_attention), staticmethod(spec.write_kv)

    def __init__(self, queries: int, positions: int) -> None:
        self.tiles = {"tile_queries": queries, "tile_positions": positions}

    def paged_attention(self, *given, **scoring):
        return spec.flash_attention(*given, **scoring, **self.tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 10])
@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize("tiles", [(1, 1), (5, 7), (16, 32), (64, 128)], ids=str)
def test_tiles_change_nothing(tiles, name, window, dtype):
    heads = Heads(num_heads=3, num_kv_heads=1, head_dim=10, block_size=6)
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(LENGTHS)]
    tiled, naive = Cache(heads, sequences), Cache(heads, sequences)
    for cache in (tiled, naive):
        cache.step([Chunk(3, 0, 13), Chunk(2, 0, 32)], body=spec)
    actual = tiled.step(STEP, body=Flash(*tiles), window=window, **SCORINGS[name])
    expected = naive.step(STEP, body=spec, window=window, **SCORINGS[name])
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine, theirs)


def test_scores_that_would_overflow_do_not():
    """e^s of the highest score is 1, whatever the score is."""
    heads = Heads(num_heads=2, num_kv_heads=2, head_dim=8, block_size=4)
    sequence = draw(heads, 23, torch.float32, 1)
    sequence.q.mul_(400)
    [tiled] = Cache(heads, [sequence]).step([Chunk(0, 0, 23)], body=Flash(4, 3))
    [naive] = Cache(heads, [sequence]).step([Chunk(0, 0, 23)], body=spec)
    assert tiled.isfinite().all()
    assert_same(tiled, naive)
