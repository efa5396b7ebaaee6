"""Paged attention under the interpreter: mixed steps as the scheduler makes them, against the specification."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fused import attention
from kernels.fused.launch import recorded
from kernels.reference import attention as spec
from tests.counts import count
from tests.kernels.closeness import assert_same
from tests.kernels.pages import Cache, Chunk, Heads, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def compare(heads, dtype, device, *, window=None, exact=False, **scoring):
    on_device = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in scoring.items()}
    sequences = [draw(heads, length, dtype, seed) for seed, length in enumerate(LENGTHS)]
    fast, slow = Cache(heads, sequences, device=device), Cache(heads, sequences)
    for cache in (fast, slow):
        cache.step(BEFORE, body=WriteOnly)
    fast.let_go(MIXED, window)
    actual = fast.step(MIXED, body=Fused(**on_device), window=window, exact=exact)
    expected = slow.step(MIXED, body=Spec(**scoring), window=window)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_same(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("name", HEADS)
def test_a_mixed_step(name, exact, dtype, device):
    compare(HEADS[name], dtype, device, exact=exact)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("window", [1, 21, 256, 400])
def test_a_sliding_window(window, exact, device):
    compare(Heads(), torch.float32, device, window=window, exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_of_scoring_at_once(dtype, device):
    torch.manual_seed(1)
    compare(Heads(), dtype, device, window=90, soft_cap=2.0, alibi_slopes=torch.rand(4), sinks=torch.randn(4))


@pytest.mark.parametrize(
    "scoring",
    [{"soft_cap": 1.5}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}, {"sinks": torch.arange(4.0)}],
    ids=lambda scoring: next(iter(scoring)),
)
def test_each_way_of_scoring_alone(scoring, device):
    compare(Heads(), torch.float32, device, **scoring)


@pytest.mark.parametrize("merged", [1, 4])
@pytest.mark.parametrize("window", [None, 90])
def test_contexts_are_cut_into_even_parts(window, merged, device, monkeypatch):
    monkeypatch.setattr(attention, "LEAST_SPLIT", 64)
    monkeypatch.setattr(attention, "MOST_SPLIT", 64)
    monkeypatch.setattr(attention, "MERGED", merged)
    assert [attention.decode_splits([context], window, 2) for context in (0, 90, 200, 530)] == (
        [1, 1, 3, 6] if window is None else [1, 1, 2, 2]
    )
    compare(Heads(), torch.float32, device, window=window)


@given(
    st.lists(st.integers(0, 40_000), min_size=1, max_size=20), st.sampled_from([None, 1, 100, 4096]),
    st.sampled_from([1, 2, 8, 32]),
)  # fmt: skip
@settings(max_examples=count("attention_cuts"), deadline=None)
def test_the_device_counts_the_splits_that_the_host_made_room_for(contexts, window, kv_heads):
    """Each row's follow one another without a gap, as even as tiles allow."""
    pool = torch.zeros(1, 1, 2, kv_heads, 16, 16, device=DEVICE)
    rows, most = len(contexts), attention.most_decode_splits(len(contexts), max(contexts), window, kv_heads)
    plan = attention.plan_decode(
        pool, torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        torch.zeros(rows, 4, dtype=torch.int32, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        num_heads=kv_heads, max_splits=most, window=window,
    )  # fmt: skip
    starts = plan.split_starts.tolist()
    assert starts[-1] == attention.decode_splits(contexts, window, kv_heads) <= most
    splits = plan.splits.tolist()
    for row, context in enumerate(contexts):
        own = splits[starts[row] : starts[row + 1]]
        first = 0 if window is None else max(context - window, 0) // attention.DECODE.columns * attention.DECODE.columns
        assert own[0][1] == first and own[-1][2] == context
        assert all(one[2] == following[1] for one, following in itertools.pairwise(own))
        assert all(one[0] == row and one[3] == (len(own) == 1) for one in own)
        assert all(one[2] - one[1] <= 2 * attention.MOST_SPLIT for one in own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tiles_where_a_step_has_enough_of_them(dtype, device, monkeypatch):
    monkeypatch.setattr(attention, "LARGE_PROMPT_PROGRAMS", 1)
    compare(Heads(), dtype, device)
    compare(Heads(), dtype, device, window=21)


def test_exact_bits_depend_on_neither_chunks_nor_neighbours(device):
    heads, lengths = Heads(), [70, 300, 9]
    sequences = [draw(heads, length, torch.bfloat16, seed) for seed, length in enumerate(lengths)]

    def run(*steps: list[Chunk]) -> torch.Tensor:
        """The answers for sequence 1, computed in these steps."""
        cache = Cache(heads, sequences, device=device)
        found = []
        for step in steps:
            answers = cache.step(step, body=Fused(), exact=True)
            found += [answer for chunk, answer in zip(step, answers, strict=True) if chunk.sequence_id == 1]
        return torch.cat(found)

    whole = run([Chunk(1, 0, 300)])
    pieces = run(
        [Chunk(0, 0, 70), Chunk(1, 0, 131)],
        [Chunk(1, 131, 132)],
        [Chunk(2, 0, 9), Chunk(1, 132, 299), Chunk(0, 0, 1)],
        [Chunk(1, 299, 300)],
    )
    assert torch.equal(whole, pieces)


def test_nothing_to_attend():
    heads = Heads()
    cache = Cache(heads, [draw(heads, 4, torch.float32, 0)])
    plan = attention.plan_attention(
        cache.pool, [0], [], torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), num_heads=4
    )
    assert attention.paged_attention(torch.empty(0, 4, 16), cache.pool, 0, plan, 0.25).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 16)}, "KV heads"),
        ({"q": torch.zeros(1, 4, 16, dtype=torch.bfloat16)}, "pages are"),
        ({"q": torch.zeros(1, 4, 32)[..., ::2]}, "side by side"),
        ({"layer_id": 3}, "layer 3 of 3"),
        ({"sinks": torch.zeros(3)}, "sinks must be float32"),
    ],
    ids=["heads", "dtype", "strides", "layer", "sinks"],
)
def test_what_does_not_fit_is_refused(change, message):
    heads = Heads()
    cache = Cache(heads, [draw(heads, 4, torch.float32, 0)])
    with recorded():  # a GPU could not read these
        plan = attention.plan_attention(
            cache.pool,
            [0, 1],
            [1],
            torch.zeros(1, 1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int64),
            num_heads=4,
        )
    good = {"q": torch.zeros(1, 4, 16), "pool": cache.pool, "layer_id": 0, "plan": plan, "scale": 0.25}
    with pytest.raises(ValueError, match=message):
        attention.paged_attention(**{**good, **change})
