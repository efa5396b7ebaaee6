"""Block moves against their specification: byte for byte."""

import pytest
import torch

from kernels.fused import blocks
from kernels.ops import blocks as door
from kernels.reference import blocks as spec

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
IDS = pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
PAGES = [(2, 2, 1, 8, 16), (3, 2, 1, 1, 5), (1,), (4099,), (3, 2, 2, 16, 64)]
"""(1,) and (4099,) are no whole number of words but in float32, where 4099 words are one piece and a few."""


def draw(*shape, dtype, device):
    """Random bytes, so that NaNs of every kind are among them."""
    elements = torch.Size(shape).numel()
    return torch.randint(256, (elements * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype).view(shape)


def same(mine, theirs):
    return torch.equal(mine.contiguous().flatten().view(torch.uint8), theirs.contiguous().flatten().view(torch.uint8))


def put(values, dtype, device):
    return torch.tensor(values, dtype=dtype, device=device)


@DTYPES
@IDS
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_copy_gather_scatter(dtype, ids, page, device):
    pool = draw(7, *page, dtype=dtype, device=device)
    mine, theirs = pool.clone(), pool.clone()
    sources, targets = put([3, 0, 3, -1, 2, 5], ids, device), put([1, 4, 6, 2, -1, 5], ids, device)
    blocks.copy_blocks(mine, sources, targets)
    spec.copy_blocks(theirs, sources, targets)
    assert same(mine, theirs)
    assert same(mine[6], pool[3])

    chosen = put([6, 0, 6, 2], ids, device)
    pages = blocks.gather_blocks(mine, chosen)
    assert pages.is_contiguous()
    assert same(pages, spec.gather_blocks(theirs, chosen))

    targets = put([0, 5, -1, 2], ids, device)
    blocks.scatter_blocks(pages, mine, targets)
    spec.scatter_blocks(pages, theirs, targets)
    assert same(mine, theirs)


@DTYPES
def test_padding_leaves_a_given_buffer_as_it_was(dtype, device):
    pool, out = draw(4, 3, 10, dtype=dtype, device=device), draw(3, 3, 10, dtype=dtype, device=device)
    before = out.clone()
    assert blocks.gather_blocks(pool, put([2, -1, 0], torch.int64, device), out) is out
    assert same(out, torch.stack((pool[2], before[1], pool[0])))


@DTYPES
def test_pages_that_lie_apart(dtype, device):
    """Of every page the first half only, and buffers that begin at an odd element."""
    wide = draw(5, 2, 6, 7, dtype=dtype, device=device)
    before, pool = wide.clone(), wide[:, 0]
    buffer = draw(2 * 6 * 7 + 1, dtype=dtype, device=device)
    out = buffer[1:].view(2, 6, 7)
    first = buffer[:1].clone()
    blocks.gather_blocks(pool, put([4, 1], torch.int32, device), out)
    assert same(out, before[:, 0][[4, 1]])
    blocks.scatter_blocks(out, pool, put([0, 2], torch.int32, device))
    blocks.copy_blocks(pool, put([4], torch.int32, device), put([3], torch.int32, device))
    before[[0, 2, 3], 0] = before[[4, 1, 4], 0]
    assert same(wide, before)
    assert same(buffer[:1], first)


def test_offsets_beyond_two_to_the_31(device):
    """Pages that lie 2**31 bytes apart, in memory that only promises to be there."""
    pool = torch.empty(4 * 2**29, dtype=torch.float32, device=device).as_strided((4, 8), (2**29, 1))
    pool[3] = torch.arange(8)
    blocks.copy_blocks(pool, put([3], torch.int32, device), put([1], torch.int32, device))
    assert torch.equal(pool[1].cpu(), torch.arange(8.0))


def test_nothing_to_move(device):
    pool, none = torch.zeros(3, 8, device=device), put([], torch.int64, device)
    blocks.copy_blocks(pool, none, none)
    assert blocks.gather_blocks(pool, none).shape == (0, 8)
    blocks.scatter_blocks(torch.empty(0, 8, device=device), pool, none)
    assert not pool.any()


ONE, TWO = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "move",
    [
        lambda pool: blocks.copy_blocks(pool, ONE, TWO),
        lambda pool: blocks.copy_blocks(pool, ONE.float(), ONE),
        lambda pool: blocks.copy_blocks(pool, ONE, ONE[None]),
        lambda pool: blocks.copy_blocks(pool.transpose(1, 2), ONE, ONE),
        lambda pool: blocks.gather_blocks(pool, torch.zeros(4, dtype=torch.int64)[::2]),
        lambda pool: blocks.gather_blocks(pool, ONE, torch.zeros(2, 4, 6)),
        lambda pool: blocks.gather_blocks(pool, ONE, torch.zeros(1, 4, 6, dtype=torch.int32)),
        lambda pool: blocks.gather_blocks(pool, ONE, torch.zeros(1, 6, 4).transpose(1, 2)),
        lambda pool: blocks.scatter_blocks(torch.zeros(1, 4, 5), pool, ONE),
    ],
)
def test_what_does_not_fit_is_refused(move):
    with pytest.raises(ValueError, match=r"must be|sources, but"):
        move(torch.zeros(3, 4, 6))


@IDS
def test_the_door_on_a_cpu(ids):
    pool = draw(5, 4, 6, dtype=torch.bfloat16, device="cpu")
    before = pool.clone()
    door.copy_blocks(pool, put([4, -1], ids, "cpu"), put([0, 1], ids, "cpu"))
    pages = door.gather_blocks(pool, put([0, 3], ids, "cpu"))
    door.scatter_blocks(pages, pool, put([-1, 2], ids, "cpu"))
    assert same(pool, before[[4, 1, 3, 3, 4]])
